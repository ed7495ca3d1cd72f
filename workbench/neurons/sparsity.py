"""How much of a feed-forward layer a token uses: distributions of normalized indicators, and the neurons that a truncation error spares.

An indicator says how much a neuron matters for a token: its activation |aᵢ|, or its output magnitude |aᵢ|·‖W_out[:, i]‖.

Sources: Xiao et al. 2024, Configurable Foundation Models, arXiv 2409.02877, section 4.3; Song et al. 2024, arXiv 2402.03804 (CETT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from workbench.activations.labelled import ItemRow
from workbench.activations.sites import Site, Tokens, sample_places, stream
from workbench.ground.lazy import no_grad, torch
from workbench.ground.results import JsonObject, Number

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Indicator: TypeAlias = Literal["activation", "magnitude"]
INDICATORS: tuple[Indicator, ...] = ("activation", "magnitude")
SMALL = 0.2
"""Normalized indicators below this value count as small, as in the paper."""
SAMPLE = 256
"""Number of tokens of a sample."""
_POINTS = 101  # of the grid from 0 to 1
_TINY = 1e-30
_BISECTIONS = 30


@dataclass(frozen=True)
class TokenSample:
    """Activations of all neurons on a sample of tokens.

    Attributes:
        sites: The sites.
        activations: Per site, activations in the model's dtype [tokens, units].
        places: Row and position of each token [tokens, 2].
        available: Number of tokens that the sample was drawn from.
    """

    sites: tuple[Site, ...]
    activations: tuple[Tensor, ...]
    places: Tensor
    available: int

    @property
    def tokens(self) -> int:
        """Number of tokens in the sample."""
        return len(self.places)

    def indicator(self, site: int, indicator: Indicator) -> Tensor:
        """Return the indicator of every neuron on every token of a site, float32 [tokens, units]."""
        size = self.activations[site].float().abs()
        return size * self.sites[site].norms().to(size.device) if indicator == "magnitude" else size


def token_sample(
    model: PreTrainedModel, sites: Sequence[Site], rows: Sequence[ItemRow], *, size: int = SAMPLE, seed: int = 0
) -> TokenSample:
    """Return the activations on a random sample of tokens, which depends on the rows' lengths and the seed alone.

    The first token of a row is drawn only if it is the row's only one.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The texts.
        size: Number of tokens; all tokens if there are fewer.
        seed: Seed of the sample.
    """
    lengths = [len(row.tokens) for row in rows]
    drawn = sample_places(lengths, size, seed=seed)
    chosen = torch.unique(drawn[:, 0]).tolist()
    positions = [(drawn[:, 0] == i).nonzero().flatten() for i in chosen]  # of each chosen row's tokens in the sample
    buffers: dict[int, Tensor] = {}

    def consume(site: int, activations: Tensor, batch: Tokens) -> None:
        buffer = buffers.setdefault(site, activations.new_empty(len(drawn), activations.shape[-1], device="cpu"))
        for b, row in enumerate(batch.rows.tolist()):
            buffer[positions[row]] = activations[b, drawn[positions[row], 1]].cpu()

    stream(model, sites, [rows[i] for i in chosen], consume, "whole")
    available = sum(max(1, length - 1) for length in lengths)
    return TokenSample(tuple(sites), tuple(buffers[n] for n in range(len(sites))), drawn, available)


class Distribution(JsonObject):
    """Distribution of a normalized indicator."""

    indicator: Indicator
    """activation or magnitude."""
    layers: list[int]
    """The layers."""
    grid: list[Number]
    """Values from 0 to 1."""
    cdf: list[list[Number]]
    """Layer -> share of the neurons at or below each value."""
    small: list[Number]
    """Share below 0.2 by layer."""
    mean_small: Number
    """Mean of these shares."""
    tokens: int
    """Tokens in the sample."""
    available: int
    """Tokens that the sample was drawn from."""


def distribution(sample: TokenSample, indicator: Indicator) -> Distribution:
    """Return the distribution of an indicator, divided by the largest one of its token and layer, over the neurons and tokens of each layer.

    A token whose largest indicator is 0 has normalized indicators of 0.

    Args:
        sample: Activations on a sample of tokens.
        indicator: The indicator.
    """
    grid = torch.linspace(0, 1, _POINTS)
    cdf, small = [], []
    for site in range(len(sample.sites)):
        size = sample.indicator(site, indicator)
        values = (size / size.amax(1, keepdim=True).clamp_min(_TINY)).clamp_max(1.0)
        bins = torch.bucketize(values.flatten(), grid).bincount(minlength=_POINTS + 1)[:_POINTS]
        cdf.append((bins.cumsum(0).double() / values.numel()).tolist())
        small.append((values < SMALL).double().mean())
    return Distribution(
        indicator=indicator,
        layers=[site.layer for site in sample.sites],
        grid=[round(x, 6) for x in grid.tolist()],
        cdf=cdf,
        small=torch.stack(small).tolist(),
        mean_small=float(torch.stack(small).mean()),
        tokens=sample.tokens,
        available=sample.available,
    )


class TruncationError(JsonObject):
    """Thresholds of output magnitudes that give every layer the same cumulative error of tail truncation (CETT).

    CETT = ‖Σ_{i: mᵢ < ε} aᵢ W_out[:, i]‖ / ‖FFN(x)‖ with mᵢ = |aᵢ|·‖W_out[:, i]‖, as a mean over tokens.
    """

    target: Number
    """Error that no layer exceeds."""
    layers: list[int]
    """Layers with neurons."""
    thresholds: list[Number]
    """Threshold of the output magnitude by layer."""
    reached: list[Number]
    """Error at the threshold by layer."""
    sparsity: list[Number]
    """Share of the neurons below the threshold by layer."""
    mean_sparsity: Number | None
    """Mean of these shares."""
    tokens: int
    """Tokens in the sample."""


@no_grad
def truncation_error(sample: TokenSample, target: float = 0.2) -> TruncationError:
    """Find the largest threshold of each layer whose CETT does not exceed a target, by bisection.

    CETT grows with the threshold except where output vectors cancel, so that the threshold found is one at which it crosses the target.
    Layers of experts have no output vector per unit and are left out.

    Args:
        sample: Activations on a sample of tokens.
        target: The CETT, shared by all layers.
    """
    found = [
        (site.layer, *_threshold(sample.activations[number].float(), site, target))
        for number, site in enumerate(sample.sites)
        if site.kind == "neurons"
    ]
    layers, thresholds, reached, sparsity = ([row[i] for row in found] for i in range(4))
    return TruncationError(
        target=target,
        layers=[int(layer) for layer in layers],
        thresholds=thresholds,
        reached=reached,
        sparsity=sparsity,
        mean_sparsity=float(torch.tensor(sparsity, dtype=torch.float64).mean()) if sparsity else None,
        tokens=sample.tokens,
    )


def _threshold(activations: Tensor, site: Site, target: float) -> tuple[float, float, float]:
    """Return threshold, CETT and share of neurons below the threshold, from activations [tokens, units]."""
    columns = site.columns().float().cpu()
    bias = getattr(site.module, "bias", None)
    size = activations.abs() * site.norms().cpu()
    output = activations @ columns
    if isinstance(bias, torch.Tensor):
        output = output + bias.detach().float().cpu()
    whole = output.norm(dim=1).clamp_min(_TINY)

    def error(threshold: float) -> float:
        tail = torch.where(size < threshold, activations, 0.0) @ columns
        return float((tail.norm(dim=1) / whole).mean())

    low, high = 0.0, float(size.max()) * (1 + 1e-6)
    if error(high) <= target:
        low = high
    else:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if error(middle) <= target else (low, middle)
        # The bisection ends at a neuron's magnitude. Halfway to the next smaller one, rounding decides nothing.
        smaller = size[size < low]
        low = (low + float(smaller.max())) / 2 if len(smaller) else 0.0
    return low, error(low), float((size < low).double().mean())

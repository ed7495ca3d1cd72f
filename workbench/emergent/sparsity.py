"""Sparsity of activations: the distribution of normalized indicators, and losses when the smallest neurons of each token are masked.

An indicator says how much a neuron matters for a token: its activation |aᵢ|, or its output magnitude |aᵢ|·‖W_out[:, i]‖.

Source: Xiao et al. 2024, Configurable Foundation Models, arXiv 2409.02877, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from workbench.emergent.activations import Progress, Tokens, stream
from workbench.emergent.decompose import sample_places
from workbench.emergent.labelled import WHOLE, ItemRow
from workbench.emergent.losses import Scored, losses
from workbench.emergent.sites import Site, Visitor, visiting
from workbench.errors import UsageError
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Indicator: TypeAlias = Literal["activation", "magnitude"]
INDICATORS: tuple[Indicator, ...] = ("activation", "magnitude")
Normalizer: TypeAlias = Literal["token_max", "layer_max", "neuron_max"]
"""Maximum that an indicator is divided by: over the neurons of its token and layer, over all tokens of its layer, or over the tokens of
its neuron."""
PERCENTS = (0.0, 30.0, 50.0, 60.0, 70.0, 80.0, 90.0)
SMALL = 0.2
"""Normalized indicators below this value count as small, as in the paper."""
SAMPLE = 256
"""Number of tokens of a sample."""
_POINTS = 101  # of the grid from 0 to 1
TINY = 1e-30


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
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    *,
    size: int = SAMPLE,
    seed: int = 0,
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

    stream(model, sites, [rows[i] for i in chosen], consume, WHOLE)
    available = sum(max(1, length - 1) for length in lengths)
    return TokenSample(tuple(sites), tuple(buffers[n] for n in range(len(sites))), drawn, available)


@dataclass(frozen=True)
class Distribution:
    """The distribution of a normalized indicator, layer by layer.

    Attributes:
        indicator: The indicator.
        normalizer: Maximum that it is divided by.
        layers: The layers.
        grid: Values from 0 to 1 [points].
        cdf: Share of the neurons of all tokens whose normalized indicator is at most the value [layers, points].
        small: Share below 0.2 [layers].
        tokens: Number of tokens in the sample.
        available: Number of tokens that the sample was drawn from.
    """

    indicator: Indicator
    normalizer: Normalizer
    layers: tuple[int, ...]
    grid: Tensor
    cdf: Tensor
    small: Tensor
    tokens: int
    available: int

    def document(self) -> dict[str, Any]:
        """Return the distribution as plain data."""
        return {
            "indicator": self.indicator,
            "normalizer": self.normalizer,
            "layers": list(self.layers),
            "grid": [round(x, 6) for x in self.grid.tolist()],
            "cdf": self.cdf.tolist(),
            "small": self.small.tolist(),
            "mean_small": float(self.small.mean()),
            "tokens": self.tokens,
            "available": self.available,
        }


def distribution(sample: TokenSample, indicator: Indicator, normalizer: Normalizer = "token_max") -> Distribution:
    """Return the distribution of a normalized indicator over the neurons and tokens of each layer.

    A token, layer or neuron whose maximum is 0 has normalized indicators of 0.

    Args:
        sample: Activations on a sample of tokens.
        indicator: The indicator.
        normalizer: Maximum that it is divided by. Maxima over tokens are those of the sample.
    """
    grid = torch.linspace(0, 1, _POINTS)
    cdf, small = [], []
    for site in range(len(sample.sites)):
        values = normalized(sample.indicator(site, indicator), normalizer)
        bins = torch.bucketize(values.flatten(), grid).bincount(minlength=_POINTS + 1)[:_POINTS]
        cdf.append(bins.cumsum(0).double() / values.numel())
        small.append((values < SMALL).double().mean())
    layers = tuple(site.layer for site in sample.sites)
    return Distribution(
        indicator, normalizer, layers, grid, torch.stack(cdf), torch.stack(small), sample.tokens, sample.available
    )


def normalized(values: Tensor, normalizer: Normalizer) -> Tensor:
    """Divide indicators [tokens, units] by a maximum."""
    if normalizer == "token_max":
        largest = values.amax(1, keepdim=True)
    else:
        largest = values.amax(0, keepdim=True) if normalizer == "neuron_max" else values.max()
    return (values / largest.clamp_min(TINY)).clamp_max(1.0)


@dataclass(frozen=True)
class MaskedLosses:
    """Losses of items when the neurons with the lowest indicator of each token and layer are set to zero.

    Attributes:
        indicators: The indicators.
        percents: Share of the neurons that is masked, in percent, ascending from 0.
        sums: Sum of −log p of each item [indicators, percents, items] float64.
        tokens: Number of predicted tokens of each item [items].
        scored: Tokens whose loss counts.
    """

    indicators: tuple[Indicator, ...]
    percents: tuple[float, ...]
    sums: Tensor
    tokens: Tensor
    scored: Scored = "whole"

    def mean(self) -> Tensor:
        """Return the mean loss per token over all items, in nats [indicators, percents]."""
        return self.sums.sum(-1) / self.tokens.sum()


def masked_losses(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    *,
    percents: Sequence[float] = PERCENTS,
    indicators: Sequence[Indicator] = INDICATORS,
    scored: Scored = "whole",
    progress: Progress = lambda *_: None,
) -> MaskedLosses:
    """Compute the loss of every item with the lowest share of the neurons masked, for several shares and both indicators.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The items' texts.
        percents: Shares to mask, in percent. 0 is added if it is missing: it is the unchanged model, computed once for all indicators.
        indicators: Indicators that choose the neurons.
        scored: Tokens whose loss counts.
        progress: Progress callback; it counts passes over the items.

    Raises:
        WorkbenchError: If a share is not between 0 and 100.
    """
    shares = sorted({0.0, *map(float, percents)})
    if bad := [share for share in shares if not 0 <= share <= 100]:
        raise UsageError(f"expected shares to mask between 0 and 100 percent, found {bad[0]:g}")
    total = 1 + len(indicators) * (len(shares) - 1)
    base = losses(model, rows, scored=scored)
    progress(1, total)
    sums = base.sums.repeat(len(indicators), len(shares), 1)
    done = 1
    for i, indicator in enumerate(indicators):
        for j, share in enumerate(shares):
            if share:
                with visiting(model, sites, masking(sites, indicator, share)):
                    sums[i, j] = losses(model, rows, scored=scored).sums
                done += 1
                progress(done, total)
    return MaskedLosses(tuple(indicators), tuple(shares), sums, base.tokens, scored)


def masking(sites: Sequence[Site], indicator: Indicator, percent: float) -> Visitor:
    """Return a visitor that sets the neurons with the lowest indicator of each token to zero.

    Args:
        sites: The sites.
        indicator: The indicator.
        percent: Share of the neurons of each layer to mask. If it rounds to no neuron, activations stay unchanged.
    """
    scale = Scale(sites, indicator)

    def visit(number: int, activations: Tensor) -> Tensor | None:
        count = round(percent / 100 * activations.shape[-1])
        if not count:
            return None
        size = scale.of(number, activations)
        lowest = size.topk(count, dim=-1, largest=False, sorted=False).indices
        return activations.scatter(-1, lowest, 0.0)

    return visit


@dataclass
class Scale:
    """Indicators of the neurons of all sites; norms of output columns are computed once."""

    sites: Sequence[Site]
    indicator: Indicator
    norms: dict[int, Tensor] = field(default_factory=dict)

    def of(self, number: int, activations: Tensor) -> Tensor:
        """Return the indicator of activations [..., units] of a site, float32."""
        size = activations.float().abs()
        if self.indicator == "activation":
            return size
        if number not in self.norms:
            self.norms[number] = self.sites[number].norms().to(size.device)
        return size * self.norms[number]

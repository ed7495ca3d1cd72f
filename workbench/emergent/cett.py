"""Cumulative error of tail truncation (CETT): how many neurons a layer can leave out at a given error of its output.

Source: Song et al. 2024, arXiv 2402.03804.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.emergent.sites import Site
from workbench.emergent.sparsity import TINY, TokenSample
from workbench.lazy import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

_STEPS = 30  # bisections


@dataclass(frozen=True)
class Cett:
    """Thresholds of output magnitudes that give every layer the same cumulative error of tail truncation (CETT).

    CETT = ‖Σ_{i: mᵢ < ε} aᵢ W_out[:, i]‖ / ‖FFN(x)‖ with mᵢ = |aᵢ|·‖W_out[:, i]‖, as a mean over tokens.

    Attributes:
        target: The CETT that no layer exceeds.
        layers: Layers with neurons; layers of experts have no output vector per unit and are left out.
        thresholds: ε of each layer [layers].
        reached: CETT at this threshold [layers].
        sparsity: Share of the neurons of all tokens below the threshold [layers].
        tokens: Number of tokens in the sample.
    """

    target: float
    layers: tuple[int, ...]
    thresholds: Tensor
    reached: Tensor
    sparsity: Tensor
    tokens: int

    def document(self) -> dict[str, Any]:
        """Return the thresholds as plain data."""
        return {
            "target": self.target,
            "layers": list(self.layers),
            "thresholds": self.thresholds.tolist(),
            "reached": self.reached.tolist(),
            "sparsity": self.sparsity.tolist(),
            "mean_sparsity": float(self.sparsity.mean()) if len(self.layers) else None,
            "tokens": self.tokens,
        }


@no_grad
def cett(sample: TokenSample, target: float = 0.2) -> Cett:
    """Find the largest threshold of each layer whose CETT does not exceed a target, by bisection.

    CETT grows with the threshold except where output vectors cancel, so that the threshold found is one at which it crosses the target.

    Args:
        sample: Activations on a sample of tokens.
        target: The CETT, shared by all layers.
    """
    found = []
    for number, site in enumerate(sample.sites):
        if site.kind == "neurons":
            found.append((site.layer, *_threshold(sample.activations[number].float(), site, target)))
    layers = tuple(layer for layer, *_ in found)
    thresholds, reached, sparsity = (torch.tensor([row[i] for row in found], dtype=torch.float64) for i in (1, 2, 3))
    return Cett(target, layers, thresholds, reached, sparsity, sample.tokens)


def _threshold(activations: Tensor, site: Site, target: float) -> tuple[float, float, float]:
    """Return threshold, CETT and share of neurons below the threshold, from activations [tokens, units]."""
    columns = site.columns().float().cpu()
    bias = getattr(site.module, "bias", None)
    size = activations.abs() * site.norms().cpu()
    output = activations @ columns
    if isinstance(bias, torch.Tensor):
        output = output + bias.detach().float().cpu()
    whole = output.norm(dim=1).clamp_min(TINY)

    def error(threshold: float) -> float:
        tail = torch.where(size < threshold, activations, 0.0) @ columns
        return float((tail.norm(dim=1) / whole).mean())

    low, high = 0.0, float(size.max()) * (1 + 1e-6)
    if error(high) <= target:
        low = high
    else:
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if error(middle) <= target else (low, middle)
        # The bisection ends at a neuron's magnitude. Halfway to the next smaller one, rounding decides nothing.
        smaller = size[size < low]
        low = (low + float(smaller.max())) / 2 if len(smaller) else 0.0
    return low, error(low), float((size < low).double().mean())

"""FeatCal: the sum of the deltas, calibrated layer after layer to what the bricks' layers make of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.merge.measuring.calibration import Calibrated, CalibrationEntry, norm_report
from workbench.merge.measuring.forward import LayerDeltas, Walk, bias_of, flipped, measured_in_order
from workbench.merge.measuring.layers import inputs_read, shared, without_padding
from workbench.models.layout import Model
from workbench.steps import Combination, Group, Laws, Measured, MergeContext, Prepared, register
from workbench.steps.fields import Bricks, Number, Real, value_at

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workbench.merge.measuring.layers import Call, LayerStack

FLOOR = 1e-8
"""Added to the ridge and to the norms of Grams, as in the paper's code."""


@register
class FeatCal(Calibrated):
    """The sum of the deltas, whose linear layers are then fitted, in forward order, to what the bricks' layers make of the merged model's inputs.

    The inputs X come from the merged model, with all layers before already fitted. A brick's layer reads a blend of these inputs and of
    its own model's. The solution stays near an anchor on the line from the base through the sum. Biases of the fitted layers follow. Norms,
    embeddings and the head get the sum.
    """

    paper = "Gu et al. 2026, FeatCal: feature calibration for post-merging models, arXiv 2605.13030"
    formula = (
        "θ = (Σ wᵢCᵢ/‖Cᵢ‖ + εI)⁻¹ (Σ wᵢ XᵢᵀYᵢ θᵢ/‖Cᵢ‖ + ε(θ₀ + ρλΣwᵢτᵢ)),  Cᵢ = XᵢᵀXᵢ,  Yᵢ = αX̂ᵢ + (1 − α)Xᵢ, with X̂ᵢ the inputs in the "
        "brick's own model"
    )
    laws = Laws(zero_is_base=False, single_is_identity=False, memory="tensor", needs="texts")

    same_texts = "every brick is then fitted on the same inputs, not on those of its own task"

    merge: Literal["featcal"]
    bricks: Bricks[CalibrationEntry] | None = None
    """Mapping of brick name to weight, or to {weight:, calibration:}. A list: each has weight 1. Default: all bricks. Weights must be 0 or more. They multiply the deltas in the sum and each brick's part of the fit."""
    lam: Number = Field(0.3, alias="lambda")
    """Scale of the sum of the deltas: the model that is calibrated."""
    anchor: Real = 2.2
    """Factor ρ on the sum's delta in the anchor. 1 is the sum itself; the default lies beyond it."""
    ridge: Real = Field(0.05, gt=0)
    """Weight ε of the anchor, relative to Grams of norm 1."""
    blend: Real = Field(0.25, ge=0, le=1)
    """Share α of the brick's own inputs in what its layers read. With 0 they read the merged model's inputs alone."""

    def measure_bytes(self, model: Model) -> int:
        """Return the size of two layers with the systems of one, or of the embeddings, and of all hidden states in two models."""
        sizes = self.sizes(model)
        return max(2 * sizes.outside, 4 * sizes.layer + 40 * sizes.squares) + 2 * sizes.hidden * self.count

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the size of the stored delta."""
        return 4 * model.weights.specs[tensor].numel

    def measure(self, context: MergeContext) -> Measured:
        """Calibrate all layers in forward order, or find them in the cache."""

        def scale(tensor: str) -> float:
            return value_at(self.lam, tensor, context.base, 0.3)

        return measured_in_order(self, context, scale, _Calibration(self.anchor, self.ridge, self.blend))

    def report(self, notes: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
        """Return the norms of the solved tensors."""
        return norm_report(notes)

    def prepare(self, group: Group) -> Prepared:
        """Return the stored delta of a calibrated tensor, and the scaled sum for any other."""
        found: LayerDeltas = group.survey
        if group.tensor in found.files:
            return found.prepared(group)
        lam = group.value("lam")
        return Combination([lam * w for w in group.values("weight")])


class _Calibration:
    """Calibration of one layer after the other.

    Args:
        anchor: ρ, the factor on the sum's delta in the anchor.
        ridge: ε, the weight of the anchor.
        blend: α, the share of a brick's own inputs.
    """

    def __init__(self, anchor: float, ridge: float, blend: float) -> None:
        self.anchor, self.ridge, self.blend = anchor, ridge, blend
        self._own: dict[str, tuple[list[Tensor], list[list[Call]]]] = {}

    def __call__(self, walk: Walk, layer: int) -> None:
        """Set the deltas of the linear layers of one decoder layer, and let the texts pass through the bricks' own layers."""
        systems: dict[tuple[Any, ...], _System] = {}
        with walk.merged.loaded(layer):
            for brick, stack in walk.bricks.items():
                if brick not in self._own:
                    self._own[brick] = stack.enter(walk.data[brick])
                for first, sums in self._sums(walk, layer, brick, stack).items():
                    self._add(walk, layer, brick, first, sums, systems)
        solved: dict[str, Tensor] = {}
        for system in systems.values():
            solved |= system.solve(walk, self.anchor, self.ridge)
        walk.solved = solved

    def _sums(self, walk: Walk, layer: int, brick: str, stack: LayerStack) -> dict[str, _Sums]:
        """Run the loaded layer of the merged model and that of a brick over the brick's texts; return the sums by an input's first reader."""
        hidden, calls = self._own[brick]
        sums: dict[str, _Sums] = {}
        names = walk.readers(layer)
        with (
            stack.loaded(layer),
            inputs_read(names) as merged,
            inputs_read({name: module for name, module in stack.readers(layer).items() if name in names}) as own,
        ):
            for i, batch in enumerate(walk.data[brick]):
                merged.clear()
                own.clear()
                walk.merged.run(layer, walk.hidden[brick][i], walk.calls[brick][i][layer])
                hidden[i] = stack.run(layer, hidden[i], calls[i][layer])
                for first, readers in shared(merged, batch).items():
                    x = without_padding(merged[first], batch)
                    y = x.lerp(without_padding(own[first], batch), self.blend)
                    sums.setdefault(first, _Sums(readers)).add(x, y)
        return sums

    def _add(self, walk: Walk, layer: int, brick: str, first: str, sums: _Sums, systems: dict[tuple[Any, ...], _System]) -> None:
        """Add a brick's sums to the systems of their readers; readers with other weights have a system of their own."""
        gram, cross = sums.gram.double().div_(sums.tokens), sums.cross.double().div_(sums.tokens)
        norm = max(float(gram.norm()), FLOOR)
        modules, added = walk.readers(layer), set[tuple[Any, ...]]()
        for name in sums.readers:
            weights = walk.weights(name)
            key = (first, *weights.values())
            system = systems.setdefault(key, _System(gram.shape[0], gram.device))
            factor = weights[brick] / norm
            if key not in added:
                added.add(key)
                system.left.add_(gram, alpha=factor)
                system.scale += factor
                system.mean.add_(sums.x.double() / sums.tokens, alpha=factor)
            weight = flipped(modules[name], walk.weight(brick, name)).double()
            line = system.lines.setdefault(name, _Line(modules[name], weight))
            line.right.addmm_(cross, weight.T, alpha=factor)
            if walk.has_bias(modules[name], name):
                bias = walk.weight(brick, bias_of(name)).double()
                line.bias.add_(bias + weight @ (sums.y.double() / sums.tokens), alpha=factor)


class _Sums:
    """Sums over the tokens of one input: x xᵀ, x yᵀ, x and y, in float32."""

    def __init__(self, readers: Sequence[str]) -> None:
        self.readers, self.tokens = list(readers), 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x of the merged model and y that a brick's layer reads, [token, in]."""
        if not self.tokens:
            self.gram, self.cross = x.T @ x, x.T @ y
            self.x, self.y = x.sum(0), y.sum(0)
        else:
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(x.T, y)
            self.x += x.sum(0)
            self.y += y.sum(0)
        self.tokens += len(x)


class _Line:
    """Right sides of one linear layer in its input's system: Σ w XᵀY θᵀ/‖C‖ [in, out] for the weight, and [out] for the bias."""

    def __init__(self, module: nn.Module, weight: Tensor) -> None:
        self.module = module
        self.right = weight.new_zeros(weight.shape[::-1])
        self.bias = weight.new_zeros(weight.shape[0])


class _System:
    """The equations of the linear layers that read one input with the same weights, in float64."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.left = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scale = 0.0
        self.lines: dict[str, _Line] = {}

    def solve(self, walk: Walk, anchor: float, ridge: float) -> dict[str, Tensor]:
        """Return the deltas of all layers and their biases, as stored."""
        self.left.diagonal().add_(ridge + FLOOR)
        factor, info = torch.linalg.cholesky_ex(self.left)
        if int(info) or not bool(torch.isfinite(factor.diagonal()).all()):
            raise WorkbenchError(
                f"featcal: the least-squares system of {next(iter(self.lines))} is singular at ridge {ridge:g}", "Raise `ridge`."
            )
        solved = {}
        for name, line in self.lines.items():
            theta = flipped(line.module, walk.base(name)).double()
            start = flipped(line.module, walk.start(name)).double()
            right = line.right + ridge * (theta + anchor * (start - theta)).T
            weight = torch.cholesky_solve(right, factor).T
            solved[name] = flipped(line.module, weight - theta)
            if walk.has_bias(line.module, name):
                base, merged = walk.base(bias_of(name)).double(), walk.start(bias_of(name)).double()
                bias = line.bias - weight @ self.mean + ridge * (base + anchor * (merged - base))
                solved[bias_of(name)] = bias / (self.scale + ridge) - base
        return solved

"""Merges in forward order: each decoder layer is merged before the texts pass through it to the next one.

One layer of the merged model and one of a brick are in memory, with the hidden states of all texts. Merged weights are kept as deltas in the
cache, one file per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.ground.results import Number, Result
from workbench.merge.measuring.calibration import Calibrated, check_weights
from workbench.merge.measuring.layers import Call, LayerStack, in_cache
from workbench.merge.measuring.matrices import rows_of
from workbench.models.architecture import is_conv1d
from workbench.models.texts import Batch, TextRow, batches
from workbench.steps import Group, Measured, MergeContext, Prepared
from workbench.steps.fields import value_at
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn


class DeltaIndex(Result):
    """Index of merged deltas in the cache."""

    files: dict[str, str]
    """Tensor name -> file name."""
    norm_ratios: dict[str, Number]
    """Tensor name -> norm of its delta over the bricks' mean norm."""


@dataclass(frozen=True)
class LayerDeltas:
    """Merged deltas of linear layers in the cache.

    Attributes:
        folder: Directory of the files.
        files: Tensor name -> file name.
        norm_ratios: Tensor name -> norm of its delta over the bricks' mean norm.
    """

    folder: Path
    files: Mapping[str, str]
    norm_ratios: Mapping[str, float]

    def prepared(self, group: Group) -> Prepared:
        """Return the stored delta of a group's tensor, block by block, and note its norm."""
        if group.tensor in self.norm_ratios:
            group.notes[group.tensor] = {"norm_ratio": self.norm_ratios[group.tensor]}
        with safe_open(self.folder / self.files[group.tensor], "pt") as file:
            delta: Tensor = file.get_tensor(group.tensor).to(group.device).view(group.spec.rows, group.spec.cols)
        return rows_of(delta)


@dataclass
class Walk:
    """The bricks' texts on their way through the merged model.

    Attributes:
        context: Source of the models.
        step: The merge step, for weights and `where`.
        scale: Function that returns λ at a tensor: the merge starts from λ times the weighted sum of the deltas.
        merged: The merged model, layer by layer.
        bricks: Each brick's model, layer by layer.
        data: Each brick's texts in batches.
        hidden: The hidden states that enter the current layer of the merged model, by brick and batch.
        calls: The other arguments of each layer, [brick][batch][layer].
        solved: Merged deltas of the current layer in float64, in the stored orientation.
    """

    context: MergeContext
    step: Calibrated
    scale: Callable[[str], float]
    merged: LayerStack
    bricks: dict[str, LayerStack]
    data: dict[str, list[Batch]]
    hidden: dict[str, list[Tensor]] = field(default_factory=dict)
    calls: dict[str, list[list[Call]]] = field(default_factory=dict)
    solved: dict[str, Tensor] = field(default_factory=dict)
    _load: dict[str, Callable[[str], Tensor]] = field(default_factory=dict)

    @classmethod
    def at_first_layer(
        cls, context: MergeContext, step: Calibrated, texts: Mapping[str, Sequence[TextRow]], scale: Callable[[str], float]
    ) -> Walk:
        """Return the texts in front of the first layer."""
        stacks = {brick: LayerStack.for_brick(context, brick) for brick in (*texts, "")}
        loaders = {brick: stack.tensor for brick, stack in stacks.items() if stack.tensor is not None}
        if len(loaders) < len(stacks):
            raise WorkbenchError(
                f"{step.name}: transformers fuses weights of {context.base.config.get('model_type')}, such as experts, so that its layers "
                "cannot be merged one by one",
                "Use `merge: regmean`.",
            )
        base = stacks.pop("")
        data = {brick: list(batches(rows, context.device)) for brick, rows in texts.items()}
        walk = cls(context, step, scale, base, stacks, data, _load=loaders)
        walk.merged = replace(base, tensor=walk._merged)
        for brick, rows in walk.data.items():
            walk.hidden[brick], walk.calls[brick] = walk.merged.enter(rows)
        return walk

    def _merged(self, tensor: str) -> Tensor:
        """Return a tensor of the merged model: the solved weights if they are known, else the sum of deltas."""
        if tensor in self.solved:
            return (self.base(tensor).double() + self.solved[tensor]).float()
        return self.start(tensor)

    def start(self, tensor: str) -> Tensor:
        """Return a tensor of the base plus the sum of the deltas; the base's own where the step changes nothing."""
        theta = self.base(tensor)
        if not self.changes(tensor):
            return theta
        total = torch.zeros_like(theta)
        lam = self.scale(tensor)
        for brick, weight in self.weights(tensor).items():
            total.add_(self.weight(brick, tensor) - theta, alpha=lam * weight)
        return theta + total

    def base(self, tensor: str) -> Tensor:
        """Return a tensor of the base in float32."""
        return self.weight("", tensor)

    def weight(self, brick: str, tensor: str) -> Tensor:
        """Return a tensor of a brick's model in float32."""
        return self._load[brick](tensor)

    def has_bias(self, module: nn.Module, tensor: str) -> bool:
        """Return True if a linear layer has a bias that the step changes."""
        name = bias_of(tensor)
        return getattr(module, "bias", None) is not None and name in self.context.base.weights.specs and self.changes(name)

    def changes(self, tensor: str) -> bool:
        """Return True if the step's `where` selects a tensor."""
        return self.step.where is None or self.step.where.matches(tensor, self.context.base)

    def weights(self, tensor: str) -> dict[str, float]:
        """Return each brick's weight at a tensor."""
        weights = {brick: value_at(self.step.entry(brick).weight, tensor, self.context.base, 1.0) for brick in self.bricks}
        check_weights(list(weights.values()), tensor, self.step.name)
        return weights

    def readers(self, layer: int) -> dict[str, nn.Module]:
        """Return the linear layers of a decoder layer that the step changes, by the tensor name of their weight."""
        return {name: module for name, module in self.merged.readers(layer).items() if self.changes(name)}

    def advance(self, layer: int) -> None:
        """Let all texts pass through a layer of the merged model."""
        with self.merged.loaded(layer):
            for brick, states in self.hidden.items():
                for i, state in enumerate(states):
                    states[i] = self.merged.run(layer, state, self.calls[brick][i][layer])


def measured_in_order(
    step: Calibrated, context: MergeContext, scale: Callable[[str], float], solve: Callable[[Walk, int], None]
) -> Measured:
    """Merge layer by layer, or find the result in the cache.

    Returns:
        The `LayerDeltas`, and a record of the texts.
    """
    texts = {brick: step.rows(context, brick) for brick in context.bricks}
    key = json_digest(
        [
            step.name,
            step.model_dump(mode="json", exclude={"id"}),
            context.keys[""],
            {brick: known for brick, (_, known) in texts.items()},
        ]
    )

    def merge(out: Path) -> DeltaIndex:
        return _merge(Walk.at_first_layer(context, step, {brick: rows for brick, (rows, _) in texts.items()}, scale), out, solve)

    place = context.cache / "forward" / key
    index = in_cache(place, merge, DeltaIndex)
    record = {
        brick: {"file": step.file(brick), "tokens": sum(len(row.tokens) for row in rows)} for brick, (rows, _) in texts.items()
    }
    return Measured(LayerDeltas(place, index.files, index.norm_ratios), {"calibration": record})


def _merge(walk: Walk, out: Path, solve: Callable[[Walk, int], None]) -> DeltaIndex:
    """Merge all layers, and write their deltas to a directory; return their index."""
    files, ratios = dict[str, str](), dict[str, float]()
    depth = len(walk.merged.layers)
    for layer in range(depth):
        walk.context.progress(layer, depth, f"merging layer {layer}")
        walk.solved = {}
        solve(walk, layer)
        for tensor, delta in walk.solved.items():
            if not bool(torch.isfinite(delta).all()):
                raise WorkbenchError(
                    f"{walk.step.name}: the merged weights of {tensor} are NaN or infinite",
                    "Check the bricks: train or fetch them again.",
                )
            if delta.dim() == 2:
                base = walk.base(tensor)
                mean = sum(float((walk.weight(brick, tensor) - base).norm()) for brick in walk.bricks) / len(walk.bricks)
                ratios[tensor] = float(delta.norm()) / mean if mean else 0.0
        if walk.solved:
            file = f"layer-{layer}.safetensors"
            save_tensors({tensor: delta.float().contiguous().cpu() for tensor, delta in walk.solved.items()}, out / file)
            files |= dict.fromkeys(walk.solved, file)
        walk.advance(layer)
    walk.context.progress(depth, depth, "merging layers")
    return DeltaIndex(files=files, norm_ratios=ratios)


def bias_of(tensor: str) -> str:
    """Return the name of the bias beside a weight."""
    return f"{tensor.removesuffix('weight')}bias"


def flipped(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as [out, in] from its stored orientation, or the other way round."""
    return weight.T if is_conv1d(module) else weight

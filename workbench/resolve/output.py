"""Results of recipes other than a checkpoint: an adapter, or a memory or router that acts on a live model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.bricks.locate import base_adapter
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.ground.parts import hook
from workbench.models.architecture import is_table
from workbench.models.layout import Model
from workbench.recipe.recipe import Recipe
from workbench.recipe.schema import Output
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import TensorSpec, Weights

if TYPE_CHECKING:
    from workbench.adapters.approximate import AdaptedWeights
    from workbench.adapters.read import Adapter


@dataclass(frozen=True)
class MemoryAt:
    """A memory directory at a version, with the digest of its content at that version."""

    path: Path
    version: int
    digest: str


@dataclass(frozen=True)
class RouterAt:
    """A fitted router on disk, and the bricks that it chooses among.

    Attributes:
        path: Directory with routing.json and router.safetensors.
        adapters: Brick -> directory of its PEFT adapter, in the router's order.
        digest: Digest of everything that decides which bricks act, and of the bricks.
    """

    path: Path
    adapters: Mapping[str, Path]
    digest: str


ACCEPTED = 0.5
"""Largest relative error of an adapter, unless the recipe's `output` says otherwise."""


def check_format(recipe: Recipe, base: Checkpoint) -> Iterator[WorkbenchError]:
    """Yield an error if the base is not in the recipe's `output: {format:}`, or for each step whose result is not a merge."""
    form = recipe.fields.output.format
    if form is None:
        return
    part = hook("outputs", f"`format: {form}`")
    for i, step in enumerate(recipe.steps):
        if step.verb != "merge":
            text = f"`format: {form}` rounds the result after the steps, which would change what `{step.verb}: {step.name}` made and checked"
            yield recipe.error(("steps", i), text, "Leave `format` out of `output`, or keep merge steps alone.")
    if base_adapter(base):
        text = f"`format: {form}` takes the bytes of the base, but this base has an adapter on it"
        yield recipe.error(("output", "format"), text, "Name the model alone as `base`, and merge the adapter as a brick.")
    elif reason := part.refusal(form, base):
        yield recipe.error(("output", "format"), *reason)


def packed(result: Weights, base: Checkpoint, output: Output) -> Any:
    """Return a recipe's result rounded to its `output: {format:}`; see `quantized.outputs.PackedWeights`."""
    return hook("outputs").PackedWeights(result, base, output.format)


def adapt(result: Model, base: Model, output: Output) -> AdaptedWeights:
    """Convert a recipe's result to the adapter that its `output: {form: adapter}` describes."""
    from workbench.adapters.approximate import AdaptedWeights, Policy

    if isinstance(result.weights, AdaptedWeights):
        return result.weights
    dtype: torch.dtype = getattr(torch, output.dtype or "float32")
    rank = output.rank if isinstance(output.rank, int) else None
    return AdaptedWeights(
        result,
        base,
        Policy(rank, dtype=dtype, dense="whole" if rank is None else "approximate", accept=output.accept_error or ACCEPTED),
    )


def changes_result(output: Output) -> bool:
    """Return True if the adapter only approximates the result, because its rank is truncated or its factors are rounded.

    The configuration is then the base with this adapter, which is scored and has its own key.
    """
    return output.form == "adapter" and (isinstance(output.rank, int) or output.dtype not in (None, "float32"))


def planned_bytes(base: Model, output: Output, adapters: Sequence[Adapter], dense: bool, whole_too: bool) -> int:
    """Predict the size of a recipe's adapter in bytes, from headers.

    Args:
        base: The recipe's base.
        output: The recipe's `output`.
        adapters: The adapters that its steps merge.
        dense: Whether a step's result has full rank.
        whole_too: Whether bricks (checkpoints, recipes) also change tensors that are not linear weights.
    """
    size = TensorSpec.of((), output.dtype or "float32").itemsize
    if not dense:
        factors, others = _joined(adapters, output.rank if isinstance(output.rank, int) else None)
        kept = size if output.dtype else max(spec.itemsize for spec in base.weights.specs.values())  # as in the base
        return factors * size + others * kept
    assert isinstance(output.rank, int), "check_form rejects an exact rank for a dense result"
    linear = {n: s for n, s in base.weights.specs.items() if len(s.shape) == 2 and not is_table(n)}
    cut = sum(output.rank * (s.rows + s.cols) for s in linear.values())
    whole = sum(s.nbytes for n, s in base.weights.specs.items() if n not in linear) if whole_too else 0
    return cut * size + whole


def _joined(adapters: Sequence[Adapter], limit: int | None) -> tuple[int, int]:
    """Count the elements of the adapters' concatenated factors, truncated to a rank and padded to one rank as `_Files` does, and of the rest."""
    ranks: dict[str, int] = {}
    lengths: dict[str, int] = {}
    others = 0
    for adapter in adapters:
        for key, entry in adapter.entries.items():
            if len(entry.spec.shape) != 2 or ".lora_" not in key:
                others += entry.spec.numel
                continue
            rank = entry.spec.shape[0 if key.endswith(("_A", "_A.weight")) else 1]
            ranks[key] = min(ranks.get(key, 0) + rank, limit or 1 << 30)
            lengths[key] = entry.spec.numel // rank
    exact = sum(ranks[key] * lengths[key] for key in ranks)
    even = max(ranks.values(), default=0) * sum(lengths.values())
    return even if even <= 2 * exact else exact, others


def check_form(recipe: Recipe, kinds: Mapping[str, str]) -> Iterator[WorkbenchError]:
    """Yield an error for each part of the recipe whose result `output: {form: adapter}` cannot hold."""
    if recipe.fields.output.form != "adapter":
        return
    block = recipe.fields.tokenizer
    if block is not None and (block.source != "base" or block.tokens or block.pad_to_multiple_of):
        text = "another vocabulary changes the size of the embeddings, but an adapter can only update tensors of the base"
        yield recipe.error(("tokenizer",), text, "Write `output: {form: checkpoint}`.")
    exact = recipe.fields.output.rank in (None, "exact")
    for i, step in enumerate(recipe.steps):
        used = {name: kinds.get(name, "adapter") for name in recipe.used_bricks(step)}
        for misfit in step.check_adapter(used, exact, recipe.step_ids[i]):
            yield recipe.error(("steps", i, *misfit.path), misfit.message, misfit.hint)

"""Whether an adapter can hold a recipe's result, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from workbench.adapters.approximate import AdaptedWeights, Policy
from workbench.adapters.read import Adapter
from workbench.errors import WorkbenchError
from workbench.models.layout import Model
from workbench.recipe.recipe import Recipe
from workbench.recipe.schema import Output


def adapt(result: Model, base: Model, output: Output) -> AdaptedWeights:
    """A recipe's result as its `output: {form: adapter}` asks for it."""
    if isinstance(result.weights, AdaptedWeights):
        return result.weights
    dtype: torch.dtype = getattr(torch, output.dtype or "float32")
    rank = output.rank if isinstance(output.rank, int) else None
    return AdaptedWeights(result, base, Policy(rank, dtype=dtype, dense="whole" if rank is None else "approximate"))


def changes_result(output: Output) -> bool:
    """Whether the adapter is not the result itself but an approximation, by a cut rank or by rounded factors.

    Then base and adapter together are what the recipe produces: that is scored, and has a key of its own.
    """
    return output.form == "adapter" and (isinstance(output.rank, int) or output.dtype not in (None, "float32"))


def planned_bytes(base: Model, output: Output, adapters: Sequence[Adapter], dense: bool, whole_too: bool) -> int:
    """Bytes of a recipe's adapter, from headers.

    Args:
        base: The base.
        output: The recipe's.
        adapters: The adapters that its steps merge.
        dense: Whether a step's result has full rank.
        whole_too: Whether bricks change more than linear weights: checkpoints, recipes.
    """
    size: int = getattr(torch, output.dtype or "float32").itemsize
    if not dense:
        return _joined(adapters, output.rank if isinstance(output.rank, int) else None) * size
    assert isinstance(output.rank, int), "check_form refuses an exact rank of a dense result"
    linear = {n: s for n, s in base.weights.specs.items() if len(s.shape) == 2 and base.layout.layer(n) is not None}
    cut = sum(output.rank * (s.rows + s.cols) for s in linear.values())
    whole = sum(s.nbytes for n, s in base.weights.specs.items() if n not in linear) if whole_too else 0
    return cut * size + whole


def _joined(adapters: Sequence[Adapter], limit: int | None) -> int:
    """Elements of adapters' factors side by side, cut to a rank and padded to one rank as `_Files` does."""
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
    return others + (even if even <= 2 * exact else exact)


def check_form(recipe: Recipe, kinds: Mapping[str, str]) -> list[WorkbenchError]:
    """Steps whose result the recipe's `output: {form: adapter}` cannot hold.

    Args:
        recipe: The recipe.
        kinds: Brick name -> adapter, checkpoint or recipe.
    """
    if recipe.fields.output.form != "adapter":
        return []
    problems = []
    block = recipe.fields.tokenizer
    if block is not None and (block.source != "base" or block.tokens or block.pad_to_multiple_of):
        problems.append(
            recipe.error(
                ("tokenizer",),
                "another vocabulary changes the embeddings' size, and an adapter holds updates of the base's own tensors",
                "Write `output: {form: checkpoint}`.",
            )
        )
    exact = recipe.fields.output.rank in (None, "exact")
    for i, step in enumerate(recipe.steps):
        used = {name: kinds.get(name, "adapter") for name in recipe.used_bricks(step)}
        found = step.check_adapter(used, exact, recipe.step_ids[i])
        problems += [recipe.error(("steps", i, *p.path), p.message, p.hint) for p in found]
    return problems

"""Costs of steps and runs for `plan`: bytes, tokens, memory and disk space."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.activations.sets import NeuronSet
from workbench.adapters.bind import bind
from workbench.adapters.computed import KINDS, Computed
from workbench.adapters.read import Adapter
from workbench.errors import size
from workbench.models.layout import Model
from workbench.resolve.resolved import Resolved
from workbench.run.directory import RunDirectory
from workbench.run.peaks import adapter_bytes, largest
from workbench.vocabulary.tokens import reading_bytes, same_file
from workbench.weights.header import HeadersOnlyError

# Additional bytes once transformers has built a model on the meta device to list its modules: measured 0.16 GB.
TRANSFORMERS = 160_000_000


# Speed of a live float32 model that reads text, at 2 FLOP per parameter and token: one core, SmolLM2-135M, rows of 256 tokens,
# 5.0 ms per token. Computing an edit's values takes about the same time per token, because its forward and backward passes cover
# only the layers above the edited one and the tokens after the lookup: measured 5.2 ms for lookups at the subject, 2.4 ms at the
# end of the prompt.
FLOPS_PER_SECOND = 5e10


# Tokens that the check of a growth runs through a model. CHECKED: two rows of logits and one row of generation. LEARNED: two
# steps of gradients with three passes each.
CHECKED, LEARNED = 84, 288


@dataclass
class Needs:
    """Resources that the steps of a plan need in total.

    Attributes:
        read: Bytes read.
        threads: Number of tensors computed at the same time.
        live: Peak memory of live models, in bytes; None as long as transformers builds no model.
        whole: Bytes of the largest tensors that a step holds whole, one per thread.
        tensors: Tensor -> largest number of bytes that a merge step needs for it.
        ranks: Tensor -> rank of the sum of the merge steps' updates; None if an update is not a product of factors.
        width: Largest number of bricks in a merge step.
        seconds: Seconds of computation, without reading and writing.
        cached: Ids of the steps whose result is cached.
    """

    read: int
    threads: int
    live: int | None = None
    whole: int = 0
    tensors: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int | None] = field(default_factory=dict)
    width: int = 1
    seconds: float = 1.5
    cached: list[str] = field(default_factory=list)

    def hold(self, live: int) -> None:
        """Add live models of so many bytes; with 0, one without weights."""
        self.live = max(self.live or 0, live)


def set_row(folder: str, neurons: NeuronSet) -> dict[str, Any]:
    """Return a set of neurons that a step uses as plain data, for the plan and the step's record.

    Args:
        folder: Directory of the set, as in the recipe.
        neurons: The set.
    """
    return {
        "set": folder,
        "kind": neurons.kind,
        "size": neurons.size,
        "share": neurons.share,
        "layers": len(neurons.indices),
        "digest": neurons.digest(),
    }


def numel(model: Model) -> int:
    """Return the number of a model's parameters."""
    return sum(s.numel for s in model.weights.specs.values())


def with_seconds(cost: dict[str, Any], parameters: int, passes: int) -> dict[str, Any]:
    """Return the plan's entries for a cost, with an estimate of seconds if the number of tokens is known.

    Args:
        cost: Cost of a method, as plain data.
        parameters: Number of parameters of the live model.
        passes: Computation per token in forward passes: 1, or 3 for forward and backward.
    """
    if "tokens" not in cost:
        return {"cost": cost} if cost else {}
    return {"cost": cost, "seconds": round(2 * passes * parameters * cost["tokens"] / FLOPS_PER_SECOND, 1)}


def adapter_whole(resolved: Resolved, needs: Needs, dense: bool) -> int:
    """Return the memory for writing an adapter: the largest tensors while their rank is reduced, and all updates, in bytes.

    Args:
        resolved: The recipe.
        needs: The needs of its steps.
        dense: Whether updates have full rank.
    """
    base, rank = resolved.base, resolved.recipe.fields.output.rank
    linear = {n: s for n, s in base.weights.specs.items() if len(s.shape) == 2 and base.layout.layer(n) is not None}
    reached = {n: s for n, s in (linear if dense else base.weights.specs).items() if n in needs.ranks and len(s.shape) == 2}
    work, held = adapter_bytes(reached, needs.ranks, rank if isinstance(rank, int) else None, needs.tensors)
    return largest(work, needs.threads) + held


def factor_bytes(adapter: Adapter, base: Model) -> int:
    """Return the memory for an adapter's largest update while it is merged, in bytes.

    These are the factors as read, in float32 and stacked; for kinds that PEFT computes, also the whole delta of the largest module.

    Args:
        adapter: The adapter.
        base: The base that it is merged into.
    """
    factors = 24 * max((entry.spec.numel for entry in adapter.entries.values()), default=0)
    if adapter.config["peft_type"] not in KINDS:
        return factors
    try:
        updates = bind(adapter, base.weights.specs, base).places.values()
    except HeadersOnlyError:
        return factors
    return factors + max((update.held_bytes for update in updates if isinstance(update, Computed)), default=0)


def tokens_bytes(resolved: Resolved) -> int:
    """Return the memory for reading vocabularies, in bytes: of the base and the bricks with another one, which are compared.

    Args:
        resolved: The recipe.
    """
    base = resolved.base_path
    others = [reading_bytes(brick.path) for brick in resolved.on_disk.values() if not same_file(brick.path, base)]
    if resolved.vocabulary:
        return reading_bytes(base) + sum(others)
    return reading_bytes(base) + max(others) if any(others) else 0


def disk_problems(runs: Path, needed: int, run: RunDirectory) -> list[str]:
    """Return an error message if the disk is too full for a run.

    Args:
        runs: Folder of run directories.
        needed: Bytes that the run writes.
        run: The run's directory, whose present files will be replaced.
    """
    place = next(p for p in (runs, *runs.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(place).free + (run.size() if run.path.is_dir() else 0)
    if not (run.done and not run.harm()) and needed * 1.05 > free:
        return [f"{run.path}: needs {size(needed * 1.05)} of disk space, {size(free)} free"]
    return []

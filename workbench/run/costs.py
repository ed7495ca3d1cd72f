"""Costs of steps and runs for `plan`, from shapes and ranks: bytes, tokens, memory and disk space."""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import size
from workbench.ground.results import Number, absent
from workbench.models.layout import Model
from workbench.resolve.resolved import Resolved
from workbench.run.directory import RunDirectory
from workbench.run.record import StepVerb
from workbench.steps import MergeMethod
from workbench.vocabulary.tokens import reading_bytes, same_file
from workbench.weights.header import HeadersOnlyError
from workbench.weights.lowrank import OVERSAMPLE
from workbench.weights.specs import BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS, TensorSpec

if TYPE_CHECKING:
    from workbench.activations.sets import NeuronSet
    from workbench.adapters.bind import BoundAdapter

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


class UnsolvedStep(StepVerb):
    """A step of a recipe used as a brick, whose result is not cached."""

    cost: Mapping[str, Any] | None = absent()
    """Its work."""
    seconds: Number | None = absent()
    """Estimated time of this work on one core, in seconds."""


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


def set_row(folder: str, neurons: NeuronSet) -> dict[str, object]:
    """Return a set of neurons that a step uses, by its folder, as plain data for the plan and the step's record."""
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


def seconds_of(cost: Mapping[str, object], parameters: int, passes: int) -> float:
    """Return the estimated time of a step's work; 0 if the number of its tokens is not known.

    Args:
        cost: The work.
        parameters: Number of parameters of the live model.
        passes: Computation per token in forward passes: 1, or 3 for forward and backward.
    """
    tokens = cost.get("tokens")
    return round(2 * passes * parameters * (tokens if isinstance(tokens, int) else 0) / FLOPS_PER_SECOND, 1)


def cost_row(cost: Mapping[str, object], seconds: float) -> dict[str, object]:
    """Return the plan's entries for a step's work; a time only where the number of its tokens is known."""
    return {"cost": cost, **({"seconds": seconds} if "tokens" in cost else {})} if cost else {}


def adapter_whole(resolved: Resolved, needs: Needs, dense: bool) -> int:
    """Return the memory for writing an adapter: the largest tensors while their rank is reduced, and all updates, in bytes."""
    base, rank = resolved.base, resolved.recipe.fields.output.rank
    linear = {n: s for n, s in base.weights.specs.items() if len(s.shape) == 2 and base.layout.layer(n) is not None}
    reached = {n: s for n, s in (linear if dense else base.weights.specs).items() if n in needs.ranks and len(s.shape) == 2}
    work, held = adapter_bytes(reached, needs.ranks, rank if isinstance(rank, int) else None, needs.tensors)
    return largest(work, needs.threads) + held


def factor_bytes(resolved: Resolved, name: str) -> int:
    """Return the memory for an adapter's largest update while it is merged, in bytes.

    These are the factors as read, in float32 and stacked; for kinds that PEFT computes, also the whole delta of the largest module.
    """
    from workbench.adapters.computed import KINDS, Computed

    adapter = resolved.adapters[name]
    factors = 24 * max((entry.spec.numel for entry in adapter.entries.values()), default=0)
    if adapter.config["peft_type"] not in KINDS:
        return factors
    try:
        updates = resolved.bound(name).places.values()
    except HeadersOnlyError:
        return factors
    return factors + max((update.held_bytes for update in updates if isinstance(update, Computed)), default=0)


def tokens_bytes(resolved: Resolved) -> int:
    """Return the memory for reading vocabularies, in bytes: of the base and the bricks with another one, which are compared."""
    base = resolved.base_path
    others = [reading_bytes(brick.path) for brick in resolved.on_disk.values() if not same_file(brick.path, base)]
    if resolved.vocabulary:
        return reading_bytes(base) + sum(others)
    return reading_bytes(base) + max(others) if any(others) else 0


def disk_problems(runs: Path, needed: int, run: RunDirectory) -> list[str]:
    """Return an error message if the disk is too full for a run, whose present files will be replaced."""
    place = next(p for p in (runs, *runs.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(place).free + (run.size() if run.path.is_dir() else 0)
    if not (run.done and not run.harm()) and needed * 1.05 > free:
        return [f"{run.path}: needs {size(needed * 1.05)} of disk space, {size(free)} free"]
    return []


# Rows of `svd.residual`: the difference in float32, its float64 copy and the square.
_RESIDUAL = 24 * (1 << 20)


def merged_ranks(resolved: Resolved, names: list[str]) -> dict[str, int | None] | None:
    """Return tensor -> rank of all updates of a merge step together, or None if an update is not a product of factors.

    Returns:
        None if a brick is no adapter, or an adapter needs tensors that are not local.
    """
    if not resolved.adapters.keys() >= set(names):
        return None
    try:
        bound = [resolved.bound(name) for name in names]
    except HeadersOnlyError:
        return None
    return {n: _rank(bound, n, s) for n, s in resolved.base.weights.specs.items() if any(b.touches(n) for b in bound)}


def _rank(bound: Iterable[BoundAdapter], name: str, spec: TensorSpec) -> int | None:
    ranks = [adapter.rank(name) for adapter in bound if adapter.touches(name)]
    known = [rank for rank in ranks if rank is not None]
    return sum(known) if len(known) == len(ranks) and len(spec.shape) == 2 else None


def largest(sizes: Iterable[int], threads: int) -> int:
    """Return the sum of the `threads` largest sizes, because every thread computes another tensor."""
    return sum(heapq.nlargest(threads, sizes))


def buffer_bytes(specs: Mapping[str, TensorSpec], width: int, threads: int) -> int:
    """Return the bytes of the block buffers of a run on the CPU: base, bricks, result and scratch of one block per thread.

    Args:
        specs: Shapes and dtypes of the output.
        width: Largest number of bricks in a merge step.
        threads: Number of tensors computed at the same time.
    """
    return threads * (width + 6) * 4 * max(BLOCK_ELEMENTS, *(spec.cols for spec in specs.values()))


def device_buffer_bytes(specs: Mapping[str, TensorSpec], width: int, threads: int) -> tuple[int, int]:
    """Return the bytes of the block buffers of a run on a CUDA device, as in `weights/device.py` and `weights/kernels.py`.

    Args:
        specs: Shapes and dtypes of the output.
        width: Largest number of bricks in a merge step.
        threads: Number of tensors computed at the same time.

    Returns:
        Bytes on the device (float32 buffers with scratch, and two blocks of each input in its stored dtype), and bytes of
        page-locked host memory (two blocks of each input and one block of the result). torch rounds page-locked buffers up to
        powers of two, and keeps those of each size for the next tensor.
    """
    blocks = [(min(spec.numel, max(spec.cols, DEVICE_BLOCK_ELEMENTS)), spec.itemsize) for spec in specs.values()]
    block, stored = max(size for size, _ in blocks), max(size * number for size, number in blocks)
    locked = sum({1 << (size * number - 1).bit_length() for size, number in blocks if size})
    inputs = 2 * (width + 1)
    return threads * ((width + 6) * 4 * block + inputs * stored), threads * (inputs + 1) * locked


def merge_bytes(
    step: MergeMethod, resolved: Resolved, names: list[str], ranks: Mapping[str, int | None] | None
) -> dict[str, int]:
    """Return tensor -> bytes that a merge step needs for it in addition to the block buffers."""
    specs = resolved.base.weights.specs
    in_core = step.in_core_space() or (step.laws.rotation_invariant and step.laws.memory == "tensor")
    sizes = {}
    for name in specs if ranks is None else ranks:
        rank = ranks[name] if ranks is not None and in_core else None
        sizes[name] = (
            step.tensor_bytes(resolved.base, name, len(names)) if rank is None else core_bytes(specs[name], rank, len(names))
        )
        if step.weighs_overlap() and ranks is None:
            from workbench.merge.measuring.matrices import overlap_bytes

            sizes[name] = max(sizes[name], overlap_bytes(name, specs[name].shape, len(names)))
    return sizes


def core_bytes(spec: TensorSpec, rank: int, bricks: int) -> int:
    """Return the bytes that a merge in the core space needs for a tensor.

    These are the factors as read (float32), the first basis (float64), and for the second basis its stacked factors in float32
    and float64, Q twice and the basis itself; then a few small matrices per brick.

    Args:
        spec: Shape of the tensor.
        rank: Rank of all updates together.
        bricks: Number of bricks.
    """
    second = (4 + 8 + 2 * 8 + 8) * max(spec.rows, spec.cols) * rank
    return 4 * (spec.rows + spec.cols) * rank + 8 * min(spec.rows, spec.cols) * rank + second + 16 * (bricks + 4) * rank**2


def adapter_bytes(
    specs: Mapping[str, TensorSpec], ranks: Mapping[str, int | None], limit: int | None, methods: Mapping[str, int]
) -> tuple[list[int], int]:
    """Return the memory that `output: {form: adapter}` needs, in bytes.

    Args:
        specs: Tensors that get an update.
        ranks: Tensor -> rank of its update; None if it is dense.
        limit: The rank that the recipe requests; None for `exact`.
        methods: Tensor -> bytes that the step needs to compute the update.

    Returns:
        Bytes for each tensor while the rank of its update is reduced, and bytes of all updates, which stay in memory until the
        file is written.
    """
    work, held, kept = [], 0, set()
    for name, spec in specs.items():
        size, known = spec.rows + spec.cols, ranks.get(name)
        if known is None:
            rank = min(limit or 1 << 30, spec.rows, spec.cols)
            work.append(4 * spec.numel + max(methods.get(name, 0), _decomposed(spec, rank)))
        else:
            rank = min(known, limit or known)
            # Factors in float32; in float64 Q of both sides, a copy of one side and LAPACK's copy, both rotated, both balanced.
            work.append(max(methods.get(name, 0), (4 + 8 + 8 + 8 + 8 + 8) * size * known))
        held += 4 * size * rank
        kept.add(rank)
    return work, held * (1 if len(kept) < 2 else 2)  # padding updates of a smaller rank copies them


def _decomposed(spec: TensorSpec, rank: int) -> int:
    """Return the bytes for the SVD of a dense delta: randomized, or exact if the sketch is half as wide as the matrix."""
    width, least = rank + OVERSAMPLE, min(spec.rows, spec.cols)
    if 2 * width >= least:
        return 4 * (3 * spec.numel + 4 * least**2)
    return max(_RESIDUAL, 4 * 4 * (spec.rows + spec.cols) * width)

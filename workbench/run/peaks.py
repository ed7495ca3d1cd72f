"""Memory that tensors take while `run` computes them: for `plan`, from shapes and ranks alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workbench.adapters.bind import BoundAdapter, bind
from workbench.adapters.dense import Summed, Update
from workbench.adapters.lora import LowRank
from workbench.bricks.brick import Brick
from workbench.resolve.resolved import Resolved
from workbench.steps import MergeMethod
from workbench.weights.checkpoint import HeadersOnlyError
from workbench.weights.specs import BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS, TensorSpec
from workbench.weights.svd import OVERSAMPLE

# Rows of `svd.residual`: the difference in float32, its double and its square.
_RESIDUAL = 24 * (1 << 20)


@dataclass(frozen=True)
class Merged:
    """The tensors of a merge step whose bricks are all adapters.

    Attributes:
        ranks: Tensor that the step computes -> rank of all updates side by side; None where one of them is no product of factors.
    """

    ranks: Mapping[str, int | None]

    @classmethod
    def of(cls, resolved: Resolved, names: list[str]) -> Merged | None:
        """Bind the adapters; None where a brick is none, or where that needs tensors that are not here."""
        used = [resolved.bricks[name] for name in names]
        adapters = [b.adapter for b in used if isinstance(b, Brick) and b.kind == "adapter"]
        if len(adapters) < len(used):
            return None
        base = resolved.base
        try:
            bound = [bind(adapter, base.weights.specs, base) for adapter in adapters]
        except HeadersOnlyError:
            return None
        return cls({n: _rank(bound, n, s) for n, s in base.weights.specs.items() if any(b.touches(n) for b in bound)})


def _rank(bound: Iterable[BoundAdapter], name: str, spec: TensorSpec) -> int | None:
    found = [_rank_of(adapter.places[name]) for adapter in bound if adapter.touches(name)]
    known = [rank for rank in found if rank is not None]
    return sum(known) if len(known) == len(found) and len(spec.shape) == 2 else None


def _rank_of(update: Update) -> int | None:
    if isinstance(update, LowRank):
        return sum(patch.pair.rank for patch in update.patches)
    if isinstance(update, Summed):
        found = [_rank_of(part) for part in update.updates]
        return None if None in found else sum(rank for rank in found if rank is not None)
    return None


def largest(sizes: Iterable[int], threads: int) -> int:
    """Add up the sizes of the `threads` largest tensors: every thread computes another tensor."""
    return sum(heapq.nlargest(threads, sizes))


def buffer_bytes(specs: Mapping[str, TensorSpec], width: int, threads: int) -> int:
    """Return the bytes of the block buffers of a run on the CPU: base, bricks, result and scratch of one block a thread.

    Args:
        specs: Of the output.
        width: Most bricks of a merge step.
        threads: Tensors that are computed at a time.
    """
    return threads * (width + 6) * 4 * max(BLOCK_ELEMENTS, *(spec.cols for spec in specs.values()))


def device_buffer_bytes(specs: Mapping[str, TensorSpec], width: int, threads: int) -> tuple[int, int]:
    """Return the bytes of the block buffers of a run on a CUDA device, by the arithmetic of `weights/device.py` and `weights/kernels.py`.

    Args:
        specs: Of the output.
        width: Most bricks of a merge step.
        threads: Tensors that are computed at a time.

    Returns:
        Bytes on the device: the float32 buffers, scratch included, and two blocks of each input as they lie in the files; and bytes
        of page-locked host memory: two blocks of each input and one of the result.
    """
    block = max(min(spec.numel, max(spec.cols, DEVICE_BLOCK_ELEMENTS)) for spec in specs.values())
    stored = max(spec.dtype.itemsize for spec in specs.values()) * block
    inputs = 2 * (width + 1) * stored
    return threads * ((width + 6) * 4 * block + inputs), threads * (inputs + stored)


def merge_bytes(step: MergeMethod, resolved: Resolved, names: list[str], merged: Merged | None) -> dict[str, int]:
    """Tensor -> what a merge step takes for it beside the block buffers: small matrices in the core space, else what the method says."""
    specs = resolved.base.weights.specs
    in_core = step.in_core_space() or (step.laws.rotation_invariant and step.laws.memory == "tensor")
    found = {}
    for name in merged.ranks if merged else specs:
        rank = merged.ranks[name] if merged and in_core else None
        found[name] = (
            step.tensor_bytes(resolved.base, name, len(names)) if rank is None else core_bytes(specs[name], rank, len(names))
        )
    return found


def core_bytes(spec: TensorSpec, rank: int, bricks: int) -> int:
    """Return the bytes that the core space takes for a tensor.

    The factors as they are read (float32), the first basis (float64), and while the second one is made its stacked factors in float32
    and float64, Q twice and the basis; then a few small matrices a brick.
    """
    second = (4 + 8 + 2 * 8 + 8) * max(spec.rows, spec.cols) * rank
    return 4 * (spec.rows + spec.cols) * rank + 8 * min(spec.rows, spec.cols) * rank + second + 16 * (bricks + 4) * rank**2


def adapter_bytes(
    specs: Mapping[str, TensorSpec], ranks: Mapping[str, int | None], limit: int | None, methods: Mapping[str, int]
) -> tuple[list[int], int]:
    """Return the bytes that `output: {form: adapter}` takes.

    Args:
        specs: Tensors that get an update.
        ranks: Rank of their update; None where it is dense.
        limit: The rank that the recipe asks for; None: exact.
        methods: Tensor -> what the step takes while the update is computed.

    Returns:
        Bytes for each tensor while its update is brought to its rank, and bytes of all written updates, which are held until the file
        is written.
    """
    work, held, kept = [], 0, set()
    for name, spec in specs.items():
        size, known = spec.rows + spec.cols, ranks.get(name)
        if known is None:
            rank = min(limit or 1 << 30, spec.rows, spec.cols)
            work.append(4 * spec.numel + max(methods.get(name, 0), _decomposed(spec, rank)))
        else:
            rank = min(known, limit or known)
            # Float32 factors, the product's float64 Q of both sides, one side's copy and LAPACK's, both sides turned, both balanced.
            work.append(max(methods.get(name, 0), (4 + 8 + 8 + 8 + 8 + 8) * size * known))
        held += 4 * size * rank
        kept.add(rank)
    return work, held * (1 if len(kept) < 2 else 2)  # updates of a smaller rank are padded: a copy


def _decomposed(spec: TensorSpec, rank: int) -> int:
    """Randomised SVD of a dense delta beside the delta itself, or the exact one where the sketch would be half the matrix."""
    width, least = rank + OVERSAMPLE, min(spec.rows, spec.cols)
    if 2 * width >= least:
        return 4 * (3 * spec.numel + 4 * least**2)
    return max(_RESIDUAL, 4 * 4 * (spec.rows + spec.cols) * width)

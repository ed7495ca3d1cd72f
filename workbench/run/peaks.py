"""Estimates of the memory that `run` needs for tensors, from shapes and ranks, for `plan`."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workbench.adapters.bind import BoundAdapter, bind
from workbench.merge.measuring.matrices import overlap_bytes
from workbench.resolve.resolved import Resolved
from workbench.steps import MergeMethod
from workbench.weights.header import HeadersOnlyError
from workbench.weights.lowrank import OVERSAMPLE
from workbench.weights.specs import BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS, TensorSpec

# Rows of `svd.residual`: the difference in float32, its float64 copy and the square.
_RESIDUAL = 24 * (1 << 20)


@dataclass(frozen=True)
class Merged:
    """The tensors of a merge step whose bricks are all adapters.

    Attributes:
        ranks: Tensor that the step computes -> rank of all updates together; None if an update is not a product of factors.
    """

    ranks: Mapping[str, int | None]

    @classmethod
    def of(cls, resolved: Resolved, names: list[str]) -> Merged | None:
        """Bind the adapters to the base. Return None if a brick is not an adapter or needs tensors that are not local."""
        adapters, base = resolved.adapters, resolved.base
        if not adapters.keys() >= set(names):
            return None
        try:
            bound = [bind(adapters[name], base.weights.specs, base) for name in names]
        except HeadersOnlyError:
            return None
        return cls({n: _rank(bound, n, s) for n, s in base.weights.specs.items() if any(b.touches(n) for b in bound)})


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
        page-locked host memory (two blocks of each input and one block of the result).
    """
    block = max(min(spec.numel, max(spec.cols, DEVICE_BLOCK_ELEMENTS)) for spec in specs.values())
    stored = max(spec.itemsize for spec in specs.values()) * block
    inputs = 2 * (width + 1) * stored
    return threads * ((width + 6) * 4 * block + inputs), threads * (inputs + stored)


def merge_bytes(step: MergeMethod, resolved: Resolved, names: list[str], merged: Merged | None) -> dict[str, int]:
    """Return tensor -> bytes that a merge step needs for it in addition to the block buffers.

    Args:
        step: The merge step.
        resolved: The recipe.
        names: The bricks that the step uses.
        merged: The ranks of its tensors, if all bricks are adapters.
    """
    specs = resolved.base.weights.specs
    in_core = step.in_core_space() or (step.laws.rotation_invariant and step.laws.memory == "tensor")
    sizes = {}
    for name in merged.ranks if merged else specs:
        rank = merged.ranks[name] if merged and in_core else None
        sizes[name] = (
            step.tensor_bytes(resolved.base, name, len(names)) if rank is None else core_bytes(specs[name], rank, len(names))
        )
        if step.weighs_overlap() and merged is None:
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

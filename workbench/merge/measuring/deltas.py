"""Measures of a brick's delta and its relation to other bricks: norms, zeros, cosines, sign conflicts, overlap of subspaces.

Norms and cosines of adapters are computed from the Gram matrices of their factors. Only sign conflicts require the products,
one block of rows at a time. The subspaces of a delta are spanned by its leading left (output) and right (input) singular
vectors. Their overlap is the mean squared cosine of the principal angles, ‖U₁ᵀU₂‖² / r, which is about r / dimension for
unrelated subspaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import xxhash

from workbench.ground.lazy import torch
from workbench.merge.measuring.delta_sums import DeltaSums, Measures, Meeting
from workbench.merge.streaming.deltas import Deltas
from workbench.models.layout import Model
from workbench.weights import lowrank
from workbench.weights.device import each
from workbench.weights.lowrank import Factors
from workbench.weights.specs import TensorSpec, block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

# Number of leading singular vectors of a dense delta that an overlap compares.
DIRECTIONS = 16


def measure(
    base: Model,
    brick: Deltas,
    others: Mapping[str, Deltas],
    *,
    device: torch.device,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Measures:
    """Measure a brick's delta and compare it with those of other bricks, tensor by tensor."""
    names = [
        n for n, spec in base.weights.specs.items() if spec.is_float and any(b.touches(n) for b in (brick, *others.values()))
    ]
    sums: dict[str, DeltaSums] = {}

    def work(name: str) -> None:
        sums[name] = _tensor(base, name, brick, others, device)
        if progress:
            progress(len(sums), len(names))

    each(work, names, threads)
    changed = {n: sums[n] for n in names if sums[n].square or any(m.square for m in sums[n].meetings.values())}
    layers: dict[int | None, DeltaSums] = {}
    cells: dict[tuple[int | None, str], DeltaSums] = {}
    total = DeltaSums()
    for name, measured in changed.items():
        layer, kind = _place(base, name)
        for part in (layers.setdefault(layer, DeltaSums()), cells.setdefault((layer, kind), DeltaSums()), total):
            part.add(measured)
    kinds = list(dict.fromkeys(kind for layer, kind in cells if layer is not None))
    ends = list(dict.fromkeys(kind for layer, kind in cells if layer is None))
    ordered = dict(sorted(layers.items(), key=lambda item: (item[0] is None, item[0] or 0)))
    return Measures(changed, ordered, cells, kinds, ends, total)


def _place(base: Model, name: str) -> tuple[int | None, str]:
    """Return the layer and the kind of a tensor; all experts of a layer are one kind."""
    short, layer = name.removesuffix(".weight"), base.layer_of(name)
    if layer is None:
        return None, short
    inside = short.removeprefix(f"{base.layout.prefix}{layer}.")
    return layer, re.sub(r"(?<=\.)\d+(?=\.)", "*", inside)


def _tensor(base: Model, name: str, brick: Deltas, others: Mapping[str, Deltas], device: torch.device) -> DeltaSums:
    """Return the measures of one tensor: from factors for adapters, else from the dense deltas."""
    spec = base.weights.specs[name]
    bricks = [brick, *others.values()]
    factors = [_factors(b, name, spec, device) for b in bricks]
    sums = DeltaSums(tensors=1, meetings={other: Meeting() for other in others})
    dense = others or factors[0] is None
    norm = _stream(base, name, bricks if dense else [], sums, device)
    brick_factors = factors[0]
    if brick_factors is not None:
        sums.square, sums.zeros = lowrank.inner(brick_factors, brick_factors), _zeros(brick_factors)
    for other_factors, meeting in zip(factors[1:], sums.meetings.values(), strict=True):
        if other_factors is not None:
            meeting.square, meeting.zeros = lowrank.inner(other_factors, other_factors), _zeros(other_factors)
            if brick_factors is not None:
                meeting.dot = lowrank.inner(brick_factors, other_factors)
    for part in (sums, *sums.meetings.values()):
        # A brick that does not change the tensor counts neither the base's norm nor its elements.
        part.base, part.numel, part.zeros = (norm, spec.numel, part.zeros) if part.square else (0.0, 0, 0)
    for meeting in sums.meetings.values():
        meeting.dot_variance = sums.square * meeting.square / spec.numel
    if others and len(spec.shape) == 2 and min(spec.shape) > 1:
        _overlaps(base, name, bricks, factors, sums, device)
    return sums


def _factors(brick: Deltas, name: str, spec: TensorSpec, device: torch.device) -> Factors | None:
    if brick.touches(name):
        return brick.factors(name, device)
    return Factors.zero(spec, device)


def _stream(base: Model, name: str, bricks: list[Deltas], sums: DeltaSums, device: torch.device) -> float:
    """Read all rows once, add norms, zeros, products and signs of the deltas to `sums`, and return ‖θ₀‖²."""
    norm = 0.0
    spec = base.weights.specs[name]
    source = base.weights.open(name, device)
    opened = [b.open_delta(name, device) if b.touches(name) else None for b in bricks]
    buffers = [buffer(spec, device) for _ in (None, *opened)]
    for start, stop in spec.blocks(block_elements(device)):
        weights, *values = (matrix(b, start, stop, spec.cols) for b in buffers)
        source.read(start, stop, weights)
        norm += _dot(weights, weights)
        for delta, block in zip(opened, values, strict=True):
            block.zero_() if delta is None else delta.read_delta(start, stop, weights, block)
        if not values:
            continue
        brick_block, *other_blocks = values
        sums.square += _dot(brick_block, brick_block)
        sums.zeros += int((brick_block == 0).sum())
        signs = brick_block.sign()
        for other_block, meeting in zip(other_blocks, sums.meetings.values(), strict=True):
            meeting.dot += _dot(brick_block, other_block)
            meeting.square += _dot(other_block, other_block)
            meeting.zeros += int((other_block == 0).sum())
            product = other_block.sign_().mul_(signs)
            meeting.both += int(product.count_nonzero())
            meeting.opposite += int((product < 0).sum())
    return norm


def _overlaps(
    base: Model, name: str, bricks: list[Deltas], factors: list[Factors | None], sums: DeltaSums, device: torch.device
) -> None:
    """Add the overlaps of the leading singular subspaces for each other brick that changes the tensor, too."""
    squares = [sums.square, *(m.square for m in sums.meetings.values())]
    if not squares[0]:
        return
    spaces: dict[int, tuple[Tensor, Tensor]] = {}
    for i, meeting in enumerate(sums.meetings.values(), 1):
        if not squares[i]:
            continue
        for j in (0, i):
            if j not in spaces:
                spaces[j] = _subspaces(base, name, bricks[j], factors[j], device)
        (left, right), (other_left, other_right) = spaces[0], spaces[i]
        for space, other_space, overlaps in ((left, other_left, meeting.outputs), (right, other_right, meeting.inputs)):
            small, large = sorted((space.shape[1], other_space.shape[1]))
            d = space.shape[0]
            overlaps.append(float((space.T @ other_space).square().sum()) / small)
            meeting.chance.append(large / d)
            meeting.overlap_variance += 2 * large * (d - small) * (d - large) / (small * d**2 * (d - 1) * (d + 2))


def _subspaces(base: Model, name: str, brick: Deltas, factors: Factors | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases [rows, r] and [cols, r] of a delta's column and row spaces, or of their leading part if dense."""
    if factors is not None:
        left, values, right = lowrank.core(factors)
        rank = max(1, int((values > 1e-6 * values.max()).sum()))
        return left[:, :rank], right[:rank].T
    spec = base.weights.specs[name]
    dense = torch.empty(spec.rows, spec.cols, device=device)
    source, delta, scratch = base.weights.open(name, device), brick.open_delta(name, device), buffer(spec, device)
    for start, stop in spec.blocks(block_elements(device)):
        weights = matrix(scratch, start, stop, spec.cols)
        source.read(start, stop, weights)
        delta.read_delta(start, stop, weights, dense[start:stop])
    left, _, right = lowrank.singular(dense, DIRECTIONS, xxhash.xxh32_intdigest(name.encode()))
    return left.double(), right.T.double()


def _zeros(factors: Factors) -> int:
    """Count the elements of a product that are zero because their row or column of a factor is zero."""
    rows = int(factors.left.any(dim=1).sum()) if factors.rank else 0
    cols = int(factors.right.any(dim=0).sum()) if factors.rank else 0
    return factors.left.shape[0] * factors.right.shape[1] - rows * cols


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())

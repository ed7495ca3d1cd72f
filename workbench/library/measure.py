"""What a brick changes and how that meets other bricks: norms, zeros, cosines, sign conflicts, overlap of subspaces.

Norms and cosines of adapters come from the Gram matrices of their factors; only sign conflicts need their products, a block
of rows at a time. Subspaces: the leading left (output) and right (input) singular vectors of a tensor's delta; their overlap is
the mean squared cosine of the principal angles, ‖U₁ᵀU₂‖² / r, about r / dimension for unrelated ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.merge.streaming.deltas import Deltas
from workbench.models.layout import Model
from workbench.weights import svd
from workbench.weights.lowrank import Factors
from workbench.weights.parallel import each
from workbench.weights.specs import TensorSpec, block_elements, buffer, matrix

# Leading directions of a full-rank delta that an overlap compares.
DIRECTIONS = 16


@dataclass
class Delta:
    """A brick's delta over the tensors that it changes; sums, so that parts add up."""

    square: float = 0.0
    base: float = 0.0
    """‖θ₀‖² of the same tensors."""
    zeros: int = 0
    numel: int = 0

    def settle(self, base: float, numel: int) -> None:
        """Of one tensor: one that the brick leaves alone counts for nothing."""
        self.base, self.numel, self.zeros = (base, numel, self.zeros) if self.square else (0.0, 0, 0)

    def document(self) -> dict[str, Any]:
        """Norm, norm relative to the base's, share of exact zeros."""
        norm = math.sqrt(self.square)
        return {
            "norm": norm,
            "relative": _ratio(norm, math.sqrt(self.base)),
            "zeros": _ratio(self.zeros, self.numel),
            "elements": self.numel,
        }


@dataclass
class Meeting(Delta):
    """Another brick's delta, and how it meets the first's."""

    dot: float = 0.0
    opposite: int = 0
    both: int = 0
    """Elements where both deltas are not zero; of these `opposite` have opposite signs."""
    outputs: list[float] = field(default_factory=list)
    inputs: list[float] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)


@dataclass
class DeltaSums(Delta):
    """A brick's delta over one tensor or many, beside others'."""

    tensors: int = 0
    meetings: dict[str, Meeting] = field(default_factory=dict)

    def add(self, other: DeltaSums) -> None:
        """Take in another part."""
        for name in ("square", "base", "zeros", "numel", "tensors"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for brick, theirs in other.meetings.items():
            mine = self.meetings.setdefault(brick, Meeting())
            for name in ("square", "base", "zeros", "numel", "dot", "opposite", "both", "outputs", "inputs", "chance"):
                setattr(mine, name, getattr(mine, name) + getattr(theirs, name))

    def document(self) -> dict[str, Any]:
        """The delta's measures, and for each other brick its own, cosine, conflict, overlaps. None: undefined."""
        return {
            **super().document(),
            "others": {
                brick: {
                    **Delta.document(m), "cosine": _ratio(m.dot, math.sqrt(self.square * m.square)),
                    "conflict": _ratio(m.opposite, m.both), "overlap_out": _mean(m.outputs), "overlap_in": _mean(m.inputs),
                    "overlap": _mean([*m.outputs, *m.inputs]), "chance": _mean(m.chance),
                }
                for brick, m in self.meetings.items()
            },
        }  # fmt: skip


@dataclass(frozen=True)
class Measures:
    """A brick measured on its base.

    Attributes:
        tensors: Changed tensor -> sums.
        layers: Layer -> sums; None: outside the layers.
        cells: (layer, kind of module) -> sums; the kind is what stands behind the layer's number.
        kinds: Kinds inside the layers, in file order.
        ends: Names outside the layers, in file order.
        total: All of it.
    """

    tensors: dict[str, DeltaSums]
    layers: dict[int | None, DeltaSums]
    cells: dict[tuple[int | None, str], DeltaSums]
    kinds: list[str]
    ends: list[str]
    total: DeltaSums

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "total": self.total.document(),
            "layers": [{"layer": layer, **sums.document()} for layer, sums in self.layers.items()],
            "cells": [{"layer": layer, "kind": kind, **sums.document()} for (layer, kind), sums in self.cells.items()],
            "tensors": [{"name": name, **sums.document()} for name, sums in self.tensors.items()],
        }


def measure(
    base: Model,
    brick: Deltas,
    others: Mapping[str, Deltas],
    *,
    device: torch.device,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Measures:
    """Measure a brick's delta, and how it meets others', tensor by tensor.

    Args:
        base: What deltas refer to.
        brick: The brick.
        others: Name -> a brick on the same base.
        device: Where it is computed.
        threads: Tensors at a time.
        progress: Told (done, total) tensors.
    """
    names = [
        n for n, spec in base.weights.specs.items() if spec.is_float and any(b.touches(n) for b in (brick, *others.values()))
    ]
    found: dict[str, DeltaSums] = {}

    def work(name: str) -> None:
        found[name] = _tensor(base, name, brick, others, device)
        if progress:
            progress(len(found), len(names))

    each(work, names, threads)
    changed = {n: found[n] for n in names if found[n].square or any(m.square for m in found[n].meetings.values())}
    return _gathered(base, changed)


def _gathered(base: Model, tensors: dict[str, DeltaSums]) -> Measures:
    layers: dict[int | None, DeltaSums] = {}
    cells: dict[tuple[int | None, str], DeltaSums] = {}
    total = DeltaSums()
    for name, sums in tensors.items():
        layer, kind = _place(base, name)
        for part in (layers.setdefault(layer, DeltaSums()), cells.setdefault((layer, kind), DeltaSums()), total):
            part.add(sums)
    kinds = list(dict.fromkeys(kind for layer, kind in cells if layer is not None))
    ends = list(dict.fromkeys(kind for layer, kind in cells if layer is None))
    ordered = dict(sorted(layers.items(), key=lambda item: (item[0] is None, item[0] or 0)))
    return Measures(tensors, ordered, cells, kinds, ends, total)


def _place(base: Model, name: str) -> tuple[int | None, str]:
    """Layer and kind of a tensor; experts of a layer are one kind."""
    short = name.removesuffix(".weight")
    try:
        layer = base.layout.layer(name)
    except WorkbenchError:
        return None, short
    if layer is None:
        return None, short
    inside = short.removeprefix(f"{base.layout.prefix}{layer}.")
    return layer, re.sub(r"(?<=\.)\d+(?=\.)", "*", inside)


def _tensor(base: Model, name: str, brick: Deltas, others: Mapping[str, Deltas], device: torch.device) -> DeltaSums:
    spec = base.weights.specs[name]
    bricks = [brick, *others.values()]
    factors = [_factors(b, name, spec, device) for b in bricks]
    sums = DeltaSums(tensors=1, meetings={other: Meeting() for other in others})
    dense = others or factors[0] is None
    norm = _stream(base, name, bricks if dense else [], sums, device)
    mine = factors[0]
    if mine is not None:
        sums.square, sums.zeros = svd.inner(mine, mine), _zeros(mine)
    for theirs, meeting in zip(factors[1:], sums.meetings.values(), strict=True):
        if theirs is not None:
            meeting.square, meeting.zeros = svd.inner(theirs, theirs), _zeros(theirs)
            if mine is not None:
                meeting.dot = svd.inner(mine, theirs)
    for part in (sums, *sums.meetings.values()):
        part.settle(norm, spec.numel)
    if others and len(spec.shape) == 2 and min(spec.shape) > 1:
        _overlaps(base, name, bricks, factors, sums, device)
    return sums


def _factors(brick: Deltas, name: str, spec: TensorSpec, device: torch.device) -> Factors | None:
    if brick.touches(name):
        return brick.factors(name, device)
    return Factors.zero(spec, device)


def _stream(base: Model, name: str, bricks: list[Deltas], sums: DeltaSums, device: torch.device) -> float:
    """One pass over the rows: of dense deltas norms, zeros, products, signs. Returns ‖θ₀‖²."""
    norm = 0.0
    spec = base.weights.specs[name]
    source = base.weights.open(name, device)
    opened = [b.open_delta(name, device) if b.touches(name) else None for b in bricks]
    rooms = [buffer(spec, device) for _ in (None, *opened)]
    for start, stop in spec.blocks(block_elements(device)):
        weights, *values = (matrix(room, start, stop, spec.cols) for room in rooms)
        source.read(start, stop, weights)
        norm += _dot(weights, weights)
        for delta, block in zip(opened, values, strict=True):
            block.zero_() if delta is None else delta.read_delta(start, stop, weights, block)
        if not values:
            continue
        mine, *theirs = values
        sums.square += _dot(mine, mine)
        sums.zeros += int((mine == 0).sum())
        signs = mine.sign()
        for block, meeting in zip(theirs, sums.meetings.values(), strict=True):
            meeting.dot += _dot(mine, block)
            meeting.square += _dot(block, block)
            meeting.zeros += int((block == 0).sum())
            product = block.sign_().mul_(signs)
            meeting.both += int(product.count_nonzero())
            meeting.opposite += int((product < 0).sum())
    return norm


def _overlaps(
    base: Model, name: str, bricks: list[Deltas], factors: list[Factors | None], sums: DeltaSums, device: torch.device
) -> None:
    """Overlap of leading singular subspaces, where both deltas are there."""
    present = [sums.square, *(m.square for m in sums.meetings.values())]
    if not present[0]:
        return
    spaces: dict[int, tuple[Tensor, Tensor]] = {}
    for i, meeting in enumerate(sums.meetings.values(), 1):
        if not present[i]:
            continue
        for j in (0, i):
            if j not in spaces:
                spaces[j] = _subspaces(base, name, bricks[j], factors[j], device)
        (left, right), (their_left, their_right) = spaces[0], spaces[i]
        for mine, theirs, kept in ((left, their_left, meeting.outputs), (right, their_right, meeting.inputs)):
            small, large = sorted((mine.shape[1], theirs.shape[1]))
            kept.append(float((mine.T @ theirs).square().sum()) / small)
            meeting.chance.append(large / mine.shape[0])


def _subspaces(base: Model, name: str, brick: Deltas, factors: Factors | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal bases [rows, r] and [cols, r] of a delta's column and row space; of a dense delta its leading part."""
    if factors is not None:
        left, values, right = svd.core(factors)
        rank = max(1, int((values > 1e-6 * values.max()).sum()))
        return left[:, :rank], right[:rank].T
    spec = base.weights.specs[name]
    whole = torch.empty(spec.rows, spec.cols, device=device)
    source, delta, room = base.weights.open(name, device), brick.open_delta(name, device), buffer(spec, device)
    for start, stop in spec.blocks(block_elements(device)):
        weights = matrix(room, start, stop, spec.cols)
        source.read(start, stop, weights)
        delta.read_delta(start, stop, weights, whole[start:stop])
    left, _, right = svd.singular(whole, DIRECTIONS, xxhash.xxh32_intdigest(name.encode()))
    return left.double(), right.T.double()


def _zeros(factors: Factors) -> int:
    """Elements of a product that its factors make zero: in rows or columns without an entry."""
    rows = int(factors.left.any(dim=1).sum()) if factors.rank else 0
    cols = int(factors.right.any(dim=0).sum()) if factors.rank else 0
    return factors.left.shape[0] * factors.right.shape[1] - rows * cols


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None

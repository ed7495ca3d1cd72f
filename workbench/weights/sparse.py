"""Deltas thinned out element by element, then summed or elected: the block loops of TIES and DARE.

As in `kernels`, one form in C and one in torch with the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.weights.kernels import (
    INFINITE,
    KINDS,
    all_finite,
    as_float,
    count_of,
    library_for,
    magnitude_bits,
    pointer,
    scratch,
)

ALL_TIES = 1 << 62
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BEFORE, _FREQUENCY, _COUNT, _SUM = 1, 2, 4, 8
_LANES = 16


@dataclass(frozen=True)
class Trim:
    """Keep magnitudes above a threshold, and the first so many that equal it.

    Attributes:
        threshold: Magnitude bits of the smallest kept value; 0 keeps everything.
        ties: How many values equal to it are kept, first ones first.
    """

    threshold: int
    ties: int = ALL_TIES


@dataclass(frozen=True)
class Drop:
    """Keep each element with a probability, and scale what is kept.

    Attributes:
        key: 64 bits. Element i of a tensor is kept where 32 bits of SplitMix64 at counter i/2 from `key` lie below
            share · 2³²: the same on every device, for any blocks.
        share: Between 0 and 1, taken to the nearest multiple of 2⁻³².
        scale: Factor of what is kept.
    """

    key: int
    share: float
    scale: float = 1.0

    @property
    def below(self) -> int:
        """The bound of the 32 bits."""
        return round(self.share * (1 << 32))


@dataclass(frozen=True)
class Vote:
    """How one sign is elected per element, and what the agreeing deltas are divided by.

    Attributes:
        before: Weights count in the election; else only in the mean.
        frequency: The sum of signs elects; else the sum of values.
        count: Divide by the number of agreeing deltas; else by the sum of their weights.
    """

    before: bool
    frequency: bool
    count: bool

    @property
    def flags(self) -> int:
        """For the C form."""
        return _BEFORE * self.before | _FREQUENCY * self.frequency | _COUNT * self.count


@dataclass(frozen=True)
class Selection:
    """λ times the elected mean, or the sum, of weighted deltas that were thinned out; no vote: the sum."""

    thin: Sequence[Trim | Drop]
    weights: Sequence[float]
    lam: float
    vote: Vote | None = None


@dataclass(slots=True)
class Rows:
    """Some rows of one tensor, unchecked, in the dtype that they lie in.

    Attributes:
        base: [rows, cols]; None where every brick gives a delta and the base is not asked for.
        bricks: One [rows, cols] a brick; None where it does not touch the tensor.
        are_deltas: Whether a brick gives its delta; else its own tensor.
    """

    base: Tensor | None
    bricks: list[Tensor | None]
    are_deltas: list[bool]

    def delta(self, brick: int, out: Tensor) -> Tensor:
        """One brick's delta in float32."""
        rows = self.bricks[brick]
        if rows is None:
            return out.zero_()
        out.copy_(rows)
        if not self.are_deltas[brick]:
            assert self.base is not None
            out.sub_(self.base.float())
        return out


def window(rows: Rows, brick: int, low: int, counts: Tensor) -> int:
    """Count a delta's magnitude bits inside [low, low + len(counts)), int32; returns how many lie above, −1 if one is not finite."""
    x, base, is_delta = rows.bricks[brick], rows.base, rows.are_deltas[brick]
    assert x is not None, "a brick that does not touch the tensor has no delta to count"
    if library := library_for(x, *([base] if base is not None else [])):
        return int(library.wb_window(pointer(x), KINDS[x.dtype], is_delta, pointer(base), _kind(base), count_of(x), ctypes.c_uint32(low),
                                     ctypes.c_uint32(len(counts)), pointer(counts)))  # fmt: skip
    bits = magnitude_bits(rows.delta(brick, scratch(x, 0))).view(-1)
    inside = bits[(bits >= low) & (bits < low + len(counts))].sub_(low).long()
    counts.scatter_add_(0, inside, torch.ones_like(inside, dtype=counts.dtype))
    return int((bits >= low + len(counts)).sum()) if int(bits.max()) < INFINITE else -1


def find(counts: Tensor, rank: int) -> tuple[int, int] | None:
    """The bin of the `rank`-th largest value, and how many values lie in bins above it; None where there are fewer.

    Args:
        counts: Values a bin, int32 (the C form) or int64.
        rank: From 1.
    """
    if library := library_for(counts):
        above = ctypes.c_int64(0)
        index = int(library.wb_find(pointer(counts), count_of(counts), ctypes.c_int64(rank), ctypes.byref(above)))
        return (index, above.value) if index >= 0 else None
    from_top = np.cumsum(counts.cpu().numpy()[::-1], dtype=np.int64)
    index = int(np.searchsorted(from_top, rank))
    return (len(from_top) - 1 - index, int(from_top[index - 1]) if index else 0) if index < len(from_top) else None


def drop_sums(rows: Rows, brick: int, drop: Drop, index: int, sums: list[float]) -> list[float] | None:
    """`sums` plus a delta's magnitudes and those of what a drop keeps, from element `index` on; None if one is not finite."""
    x, base, is_delta = rows.bricks[brick], rows.base, rows.are_deltas[brick]
    if x is None:
        return sums
    if library := library_for(x, *([base] if base is not None else [])):
        totals = (ctypes.c_double * 2)(*sums)
        finite = library.wb_drop_sums(pointer(x), KINDS[x.dtype], is_delta, pointer(base), _kind(base), count_of(x), ctypes.c_uint64(drop.key),
                                      ctypes.c_uint64(index), ctypes.c_uint64(drop.below), totals)  # fmt: skip
        return list(totals) if finite else None
    delta = rows.delta(brick, scratch(x, 0))
    if not all_finite(delta):
        return None
    kept = dropped(delta.clone(), drop.key, drop.below, 1.0, index)
    found = []
    for values, total in zip((delta, kept), sums, strict=True):
        flat = torch.nn.functional.pad(values.abs().view(-1), (0, -values.numel() % 1024)).view(-1, 64, _LANES)
        lanes = torch.zeros_like(flat[:, 0])
        for row in range(64):
            lanes.add_(flat[:, row])
        found.append(float(np.cumsum([total, *lanes.double().view(-1).tolist()])[-1]))
    return found


def select(rows: Rows, selection: Selection, left: list[int], index: int, add_base: bool, out: Tensor) -> bool:
    """out = [base +] the selection of some rows.

    Args:
        rows: What is read.
        selection: What to compute.
        left: What is left of every trim's ties; updated.
        index: Place of the first element in its tensor.
        add_base: Whether the base is added.
        out: [rows, cols], float32.

    Returns:
        Whether every delta is finite.
    """
    lam = selection.lam if selection.vote else 1.0
    weights = [w if selection.vote else selection.lam * w for w in selection.weights]
    given = [x for x in (rows.base, *rows.bricks) if x is not None]
    if library := library_for(out, *given):
        return _select_compiled(library, rows, selection, left, index, (weights, lam), add_base, out)
    deltas = [rows.delta(i, scratch(out, 10 + i)) for i in range(len(rows.bricks))]
    finite = all(all_finite(delta) for delta in deltas)
    for i, (delta, thin) in enumerate(zip(deltas, selection.thin, strict=True)):
        if isinstance(thin, Drop):
            dropped(delta, thin.key, thin.below, thin.scale, index)
        elif thin.threshold:
            left[i] = trimmed(delta, thin.threshold, left[i])
    if selection.vote:
        elected(deltas, weights, lam, selection.vote, out)
    else:
        out.zero_()
        for delta, weight in zip(deltas, weights, strict=True):
            out.add_(delta.mul_(as_float(weight)))
    if add_base:
        assert rows.base is not None
        out.add_(rows.base)
    return finite


def _select_compiled(
    library: ctypes.CDLL, rows: Rows, selection: Selection, left: list[int], index: int, scales: tuple[list[float], float],
    add_base: bool, out: Tensor,
) -> bool:  # fmt: skip
    count = len(rows.bricks)
    weights, lam = scales
    drops = [t if isinstance(t, Drop) else Drop(0, 0.0) for t in selection.thin]
    thresholds = [t.threshold if isinstance(t, Trim) else 0 for t in selection.thin]
    operations = [2 if isinstance(t, Drop) else int(t.threshold > 0) for t in selection.thin]
    ties = (ctypes.c_int64 * count)(*left)
    finite = library.wb_sparse(
        count, (ctypes.c_void_p * count)(*(None if x is None else x.data_ptr() for x in rows.bricks)),
        (ctypes.c_int * count)(*(map(_kind, rows.bricks))), (ctypes.c_int * count)(*rows.are_deltas), pointer(rows.base), _kind(rows.base),
        (ctypes.c_int * count)(*operations), (ctypes.c_uint32 * count)(*thresholds), ties, (ctypes.c_uint64 * count)(*(d.key for d in drops)),
        (ctypes.c_uint64 * count)(*(d.below for d in drops)), (ctypes.c_float * count)(*(d.scale for d in drops)), ctypes.c_uint64(index),
        (ctypes.c_float * count)(*weights), selection.vote.flags if selection.vote else _SUM, ctypes.c_float(lam), add_base, pointer(out),
        count_of(out))  # fmt: skip
    left[:] = list(ties)
    return bool(finite)


def trimmed(x: Tensor, threshold: int, ties: int) -> int:
    """Zero, in place, magnitudes below `threshold` (bits) and those equal to it after the first `ties`; returns the ties left."""
    equal = torch.abs(x, out=scratch(x, 0)) == _float(threshold)
    found = int(equal.sum())
    if 0 < ties < found:
        equal &= equal.view(-1).cumsum(0).view(x.shape) > ties  # the ties that go
        x.masked_fill_(equal, 0.0)
    # |x| > below is |x| >= threshold: the next smaller float32
    torch.hardshrink(x, _float(threshold - 1) if ties else _float(threshold), out=x)
    return ties - min(ties, found)


def dropped(x: Tensor, key: int, below: int, scale: float, index: int) -> Tensor:
    """Keep, in place, elements whose random bits lie below a bound, times `scale`; zero the others."""
    count = x.numel()
    word = torch.arange(index >> 1, (index + count + 1) >> 1, dtype=torch.int64, device=x.device)
    other = torch.empty_like(word)
    word.mul_(_signed(_GOLDEN)).add_(_signed(key))
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        word ^= _shift(word, shift, other)
        word.mul_(_signed(factor))
    keep = torch.empty(2 * len(word), device=x.device)
    torch.lt(_shift(word, 32, other), below, out=keep[1::2])
    torch.lt(word.bitwise_and_(0xFFFFFFFF), below, out=keep[::2])
    x.mul_(as_float(scale)).mul_(keep[index & 1 :][:count].view(x.shape))
    return x.add_(0.0)  # -0.0 becomes 0.0, as what is dropped is everywhere


def elected(deltas: Sequence[Tensor], weights: Sequence[float], lam: float, rule: Vote, out: Tensor) -> Tensor:
    """out = λ times the mean of the deltas that have each element's elected sign."""
    vote, mass, voice, agrees = (scratch(out, slot) for slot in range(4))
    shares = [as_float(weight) for weight in weights]
    vote.zero_()
    for x, weight in zip(deltas, shares, strict=True):
        torch.mul(x, weight if rule.before else 1.0, out=voice)
        vote.add_(torch.sign(voice, out=voice) if rule.frequency else voice)
    vote.sign_()
    out.zero_()
    mass.zero_()
    for x, weight in zip(deltas, shares, strict=True):
        torch.sign(torch.mul(x, weight if rule.before else 1.0, out=voice), out=voice)
        torch.mul(voice, vote, out=agrees).clamp_min_(0)  # 1 where the delta has the elected sign, else 0
        out.add_(torch.mul(x, weight, out=voice).mul_(agrees))
        mass.add_(agrees if rule.count else agrees.mul_(weight))
    mass.add_(torch.eq(mass, 0, out=agrees))
    return out.div_(mass).mul_(as_float(lam))


def _kind(x: Tensor | None) -> int:
    return -1 if x is None else KINDS[x.dtype]


def _float(bits: int) -> float:
    """The float32 of magnitude bits; of -1, what lies below 0."""
    return -1.0 if bits < 0 else float(np.int32(bits).view(np.float32))


def _shift(x: Tensor, by: int, out: Tensor) -> Tensor:
    """Logical shift to the right of int64."""
    return torch.bitwise_right_shift(x, by, out=out).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value

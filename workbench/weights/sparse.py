"""Block loops of TIES and DARE: deltas are made sparse element by element, then summed or combined by sign election.

As in `kernels`, there is a version in C and one in torch, with bit-identical results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.ground.lazy import np, torch
from workbench.weights.kernels import (
    INFINITE,
    all_finite,
    as_float,
    count_of,
    kind_of,
    library_for,
    magnitude_bits,
    pointer,
    scratch,
)

if TYPE_CHECKING:
    from torch import Tensor

ALL_TIES = 1 << 62
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BEFORE, _FREQUENCY, _COUNT, _SUM = 1, 2, 4, 8
_LANES = 16


@dataclass(frozen=True)
class Trim:
    """Keep magnitudes above a threshold, and a number of those equal to it.

    Attributes:
        threshold: Magnitude bits of the smallest value to keep; 0 keeps everything.
        ties: Number of values equal to the threshold to keep, in the order of the elements.
    """

    threshold: int
    ties: int = ALL_TIES


@dataclass(frozen=True)
class Drop:
    """Keep each element with a probability, and scale the kept elements.

    Attributes:
        key: 64 bits. Element i of a tensor is kept if 32 bits of SplitMix64 at counter i/2 from `key` are below share · 2³², on every
            device and for any block size.
        share: Probability from 0 to 1, rounded to a multiple of 2⁻³².
        scale: Factor for the kept elements.
    """

    key: int
    share: float
    scale: float = 1.0

    @property
    def below(self) -> int:
        """The upper bound of an element's 32 random bits."""
        return round(self.share * (1 << 32))


@dataclass(frozen=True)
class Vote:
    """The rule that elects one sign per element and averages the deltas that agree with it.

    Attributes:
        before: Weight the deltas before the election; if false, weight them only in the mean.
        frequency: Elect the sign of the sum of signs; if false, that of the sum of values.
        count: Divide by the number of agreeing deltas; if false, by the sum of their weights.
    """

    before: bool
    frequency: bool
    count: bool

    @property
    def flags(self) -> int:
        """The rule as bits for the C version."""
        return _BEFORE * self.before | _FREQUENCY * self.frequency | _COUNT * self.count


@dataclass(frozen=True)
class Selection:
    """λ times the elected mean of sparse weighted deltas, or λ times their sum if there is no vote."""

    thin: Sequence[Trim | Drop]
    weights: Sequence[float]
    lam: float
    vote: Vote | None = None


@dataclass(slots=True)
class Rows:
    """Some rows of one tensor, unchecked, in their stored dtypes.

    Attributes:
        base: [rows, cols]; None if all bricks provide deltas and the base is not needed.
        bricks: [rows, cols] for each brick; None for a brick that does not change the tensor.
        are_deltas: For each brick, whether it provides its delta; if false, it provides its own tensor.
    """

    base: Tensor | None
    bricks: list[Tensor | None]
    are_deltas: list[bool]

    def delta(self, brick: int, out: Tensor) -> Tensor:
        """Fill `out` with one brick's delta in float32."""
        rows = self.bricks[brick]
        if rows is None:
            return out.zero_()
        out.copy_(rows)
        if not self.are_deltas[brick]:
            assert self.base is not None
            out.sub_(self.base.float())
        return out


def window(rows: Rows, brick: int, low: int, counts: Tensor) -> int:
    """Count a delta's elements by magnitude bits, for those in [low, low + len(counts)).

    Returns:
        The number of elements above the last bin, or -1 if an element is not finite.
    """
    x, base, is_delta = rows.bricks[brick], rows.base, rows.are_deltas[brick]
    assert x is not None, "a brick that does not change the tensor has no delta to count"
    if library := library_for(x, *([base] if base is not None else [])):
        delta_of = pointer(x), kind_of(x), is_delta, pointer(base), _kind(base), count_of(x)
        return int(library.wb_window(*delta_of, ctypes.c_uint32(low), ctypes.c_uint32(len(counts)), pointer(counts)))
    bits = magnitude_bits(rows.delta(brick, scratch(x, 0))).view(-1)
    in_window = bits[(bits >= low) & (bits < low + len(counts))].sub_(low).long()
    counts.scatter_add_(0, in_window, torch.ones_like(in_window, dtype=counts.dtype))
    return int((bits >= low + len(counts)).sum()) if int(bits.max()) < INFINITE else -1


def find(counts: Tensor, rank: int) -> tuple[int, int] | None:
    """Find the bin of the `rank`-th largest value.

    Args:
        counts: Number of values per bin, int32 (the C version) or int64.
        rank: Rank, starting at 1.

    Returns:
        The bin and the number of values in the bins above it; None if there are fewer than `rank` values.
    """
    if library := library_for(counts):
        above = ctypes.c_int64(0)
        index = int(library.wb_find(pointer(counts), count_of(counts), ctypes.c_int64(rank), ctypes.byref(above)))
        return (index, above.value) if index >= 0 else None
    from_top = np.cumsum(counts.cpu().numpy()[::-1], dtype=np.int64)
    index = int(np.searchsorted(from_top, rank))
    return (len(from_top) - 1 - index, int(from_top[index - 1]) if index else 0) if index < len(from_top) else None


def drop_sums(rows: Rows, brick: int, drop: Drop, index: int, sums: list[float]) -> list[float] | None:
    """Add up a delta's magnitudes, and those of the elements that a drop keeps.

    Returns:
        Both sums; None if an element is not finite.
    """
    x, base, is_delta = rows.bricks[brick], rows.base, rows.are_deltas[brick]
    if x is None:
        return sums
    if library := library_for(x, *([base] if base is not None else [])):
        totals = (ctypes.c_double * 2)(*sums)
        delta_of = pointer(x), kind_of(x), is_delta, pointer(base), _kind(base), count_of(x)
        choice = ctypes.c_uint64(drop.key), ctypes.c_uint64(index), ctypes.c_uint64(drop.below)
        return list(totals) if library.wb_drop_sums(*delta_of, *choice, totals) else None
    delta = rows.delta(brick, scratch(x, 0))
    if not all_finite(delta):
        return None
    remaining = dropped(delta.clone(), drop.key, drop.below, 1.0, index)
    new_sums = []
    for values, total in zip((delta, remaining), sums, strict=True):
        flat = torch.nn.functional.pad(values.abs().view(-1), (0, -values.numel() % 1024)).view(-1, 64, _LANES)
        lanes = torch.zeros_like(flat[:, 0])
        for row in range(64):
            lanes.add_(flat[:, row])
        new_sums.append(float(np.cumsum([total, *lanes.double().view(-1).tolist()])[-1]))
    return new_sums


def select(rows: Rows, selection: Selection, left: list[int], index: int, add_base: bool, out: Tensor) -> bool:
    """Compute out = selection of some rows, plus the base if `add_base`.

    Args:
        rows: The tensor's rows.
        selection: The computation.
        left: For each brick, the number of ties that its trim may still keep; updated.
        index: Position of the first element in its tensor.
        add_base: Whether to add the base.
        out: [rows, cols], float32.

    Returns:
        Whether every delta is finite.
    """
    lam = selection.lam if selection.vote else 1.0
    weights = [w if selection.vote else selection.lam * w for w in selection.weights]
    inputs = [x for x in (rows.base, *rows.bricks) if x is not None]
    if library := library_for(out, *inputs):
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
    library: ctypes.CDLL,
    rows: Rows,
    selection: Selection,
    left: list[int],
    index: int,
    scales: tuple[list[float], float],
    add_base: bool,
    out: Tensor,
) -> bool:
    count = len(rows.bricks)
    weights, lam = scales
    drops = [t if isinstance(t, Drop) else Drop(0, 0.0) for t in selection.thin]
    thresholds = [t.threshold if isinstance(t, Trim) else 0 for t in selection.thin]
    operations = [2 if isinstance(t, Drop) else int(t.threshold > 0) for t in selection.thin]
    ties = (ctypes.c_int64 * count)(*left)
    finite = library.wb_sparse(
        count,
        (ctypes.c_void_p * count)(*(None if x is None else x.data_ptr() for x in rows.bricks)),
        (ctypes.c_int * count)(*(map(_kind, rows.bricks))),
        (ctypes.c_int * count)(*rows.are_deltas),
        pointer(rows.base),
        _kind(rows.base),
        (ctypes.c_int * count)(*operations),
        (ctypes.c_uint32 * count)(*thresholds),
        ties,
        (ctypes.c_uint64 * count)(*(d.key for d in drops)),
        (ctypes.c_uint64 * count)(*(d.below for d in drops)),
        (ctypes.c_float * count)(*(d.scale for d in drops)),
        ctypes.c_uint64(index),
        (ctypes.c_float * count)(*weights),
        selection.vote.flags if selection.vote else _SUM,
        ctypes.c_float(lam),
        add_base,
        pointer(out),
        count_of(out),
    )
    left[:] = list(ties)
    return bool(finite)


def trimmed(x: Tensor, threshold: int, ties: int) -> int:
    """Set magnitudes below a threshold to zero, in place, and those equal to it after the first `ties`.

    Args:
        x: The delta.
        threshold: Magnitude bits.
        ties: Number of elements equal to the threshold to keep.

    Returns:
        The number of ties that later blocks may still keep.
    """
    equal = torch.abs(x, out=scratch(x, 0)) == _float(threshold)
    count = int(equal.sum())
    if 0 < ties < count:
        equal &= equal.view(-1).cumsum(0).view(x.shape) > ties  # the ties beyond the limit
        x.masked_fill_(equal, 0.0)
    # |x| > t is |x| >= threshold if t is the next smaller float32.
    torch.hardshrink(x, _float(threshold - 1) if ties else _float(threshold), out=x)
    return ties - min(ties, count)


def dropped(x: Tensor, key: int, below: int, scale: float, index: int) -> Tensor:
    """Scale the elements whose random bits are below a bound, in place, and set the others to zero.

    Args:
        x: The delta.
        key: Key of the random bits; see `Drop`.
        below: Upper bound of the 32 bits of a kept element.
        scale: Factor for the kept elements.
        index: Position of the first element in its tensor.
    """
    count = x.numel()
    word = torch.arange(index >> 1, (index + count + 1) >> 1, dtype=torch.int64, device=x.device)
    scratch_words = torch.empty_like(word)
    word.mul_(_signed(_GOLDEN)).add_(_signed(key))
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        word ^= _shift(word, shift, scratch_words)
        word.mul_(_signed(factor))
    keep = torch.empty(2 * len(word), device=x.device)
    torch.lt(_shift(word, 32, scratch_words), below, out=keep[1::2])
    torch.lt(word.bitwise_and_(0xFFFFFFFF), below, out=keep[::2])
    x.mul_(as_float(scale)).mul_(keep[index & 1 :][:count].view(x.shape))
    return x.add_(0.0)  # turns -0.0 into 0.0, as in the C version


def elected(deltas: Sequence[Tensor], weights: Sequence[float], lam: float, rule: Vote, out: Tensor) -> Tensor:
    """Compute out = λ times the mean, for each element, of the deltas that have its elected sign."""
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
    return -1 if x is None else kind_of(x)


def _float(bits: int) -> float:
    """Return the float32 with some magnitude bits; a negative number for -1."""
    return -1.0 if bits < 0 else float(np.int32(bits).view(np.float32))


def _shift(x: Tensor, bits: int, out: Tensor) -> Tensor:
    """Shift int64 to the right and fill with zeros."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value

"""Trim a delta to its largest elements by magnitude: exact selection by counting, in any number of blocks.

The magnitude bits of float32 values have the same order as the values, so counting them finds the k-th largest without a sort. A
sample gives a window in which the threshold must lie. One pass counts the values above the window, and each value inside it. If
the threshold is not in the window, or if one threshold covers a whole model, two passes count the upper 16 bits and then the
lower 15. Of the values equal to the threshold the first ones are kept, so the result depends neither on a sort order nor on the
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from workbench.ground.lazy import np, torch
from workbench.steps import Group
from workbench.weights.kernels import INFINITE, magnitude_bits
from workbench.weights.sparse import ALL_TIES, Trim, find, window
from workbench.weights.specs import Array, TensorSpec, as_array, block_elements, empty

if TYPE_CHECKING:
    from torch import Tensor

_HIGH_BITS, _LOW_BITS = 16, 15
_SMALL = 1 << 18
# At most 8 MiB of counters per brick. Deltas of bf16 weights have few distinct magnitudes near the threshold.
_WINDOW = 1 << 21
# Bytes of counters per brick at usual densities, where a window spans a few percent of the magnitudes.
_COUNTERS = 1 << 20
_ERRORS = 5
_PLACES = 32


def keep_count(numel: int, density: float) -> int:
    """Return how many of `numel` elements a density keeps.

    The number is rounded down as in mergekit and PEFT, but is at least one unless the density is 0.
    """
    return min(numel, max(1, int(density * numel))) if density > 0 else 0


def trims(group: Group, densities: Sequence[float]) -> list[Trim]:
    """Return one trim per brick, over the elements of one tensor.

    This reads a sample and then the tensor once; rarely, twice more. A trim does not depend on the brick's weight, so a memo can
    store it: then the tensor is read only for densities that no earlier composition used.
    """
    counts = [keep_count(group.spec.numel, density) for density in densities]
    memo = group.memo
    if memo is None:
        return _trims(group, densities, counts)
    memo_keys = [("trim", group.tensor, key, count) for key, count in zip(group.keys, counts, strict=True)]
    stored = [memo.get(key) for key in memo_keys]
    if any(trim is None for trim in stored):
        stored = list(_trims(group, densities, counts))
        for key, trim in zip(memo_keys, stored, strict=True):
            memo.store(key, trim)
    return stored


def _trims(group: Group, densities: Sequence[float], counts: Sequence[int]) -> list[Trim]:
    """Return one trim per brick: a sample gives a window for each threshold, and one pass counts the elements in the windows."""
    numel = group.spec.numel
    if not numel:
        return [Trim(INFINITE)] * len(counts)
    if numel <= _SMALL:
        bits, _ = _bits(group, group.spec.blocks(block_elements(group.device)))
        return [_exact_trim(row, count) for row, count in zip(bits, counts, strict=True)]
    sample, touched = _bits(group, _sample(group.spec))
    windows = [_threshold_window(row, count / numel) for row, count in zip(sample, counts, strict=True)]
    histograms = [empty(width, "I32", group.device).zero_() for _, width in windows]
    above = [0] * len(counts)  # per brick, the number of elements above its window
    for start, stop in group.spec.blocks(block_elements(group.device)):
        rows = group.rows(start, stop)
        for i in touched:
            above_in_rows = window(rows, i, windows[i][0], histograms[i])
            if above_in_rows < 0:
                group.refuse_non_finite(start, stop)
            above[i] += above_in_rows
    in_window = [
        _trim_in_window(low, histogram, count, above_window)
        for (low, _), histogram, count, above_window in zip(windows, histograms, counts, above, strict=True)
    ]
    if all(in_window[i] is not None for i in touched):
        return [trim or Trim(INFINITE) for trim in in_window]
    # A threshold lies outside the window that the sample suggested: count all elements.
    return [trim or exact for trim, exact in zip(in_window, joint_trims([group], densities, stop_at_first=True), strict=True)]


def selection_bytes(numel: int, bricks: int) -> int:
    """Return the memory that `trims` usually needs for one tensor: counters, and three copies of the sample."""
    return bricks * (12 * _sample_size(numel) + (0 if numel <= _SMALL else _COUNTERS))


def _bits(group: Group, ranges: Iterable[tuple[int, int]]) -> tuple[np.ndarray, list[int]]:
    """Return the magnitude bits [bricks, elements] of some rows, and the indices of the bricks that touch the tensor."""
    parts = []
    for start, stop in ranges:
        rows = group.rows(start, stop)
        buffer = empty((stop - start) * group.spec.cols, "F32", group.device).view(stop - start, group.spec.cols)
        values = (rows.delta(i, buffer).view(-1).cpu().numpy() for i in range(len(rows.bricks)))
        deltas = (value.view(np.int32) & np.int32(0x7FFFFFFF) for value in values)
        parts.append(np.stack(list(deltas)))
    return np.concatenate(parts, axis=1), [i for i, brick in enumerate(rows.bricks) if brick is not None]


def _sample(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, 32 evenly spaced places, that hold a 64th of the tensor (64 Ki to 1 Mi elements)."""
    step = max(1, _sample_size(spec.numel) // (_PLACES * spec.cols))
    for start in range(0, spec.rows, max(step, spec.rows // _PLACES)):
        yield start, min(start + step, spec.rows)


def _sample_size(numel: int) -> int:
    return numel if numel <= _SMALL else min(max(numel // 64, 1 << 16), 1 << 20)


def _threshold_window(sample: np.ndarray, share: float) -> tuple[int, int]:
    """Return the window of the threshold, as its lowest magnitude bits and its width, from a sample's order statistics."""
    size = len(sample)
    margin = _ERRORS * math.sqrt(size * share * (1 - share)) + 16
    ranks = [min(size - 1, max(0, round(size * (1 - share) + offset))) for offset in (-margin, 0, margin)]
    low, middle, high = (int(np.partition(sample, rank)[rank]) for rank in ranks)  # faster than one call with three ranks
    if high - low >= _WINDOW:
        low = max(low, middle - _WINDOW // 2)
    return low, min(high - low + 1, _WINDOW)


def _trim_in_window(low: int, histogram: Tensor, count: int, above: int) -> Trim | None:
    """Return the trim whose threshold lies in a counted window, or None if it lies elsewhere."""
    if count == 0:
        return Trim(INFINITE)
    threshold_bin = find(histogram, count - above) if count > above else None
    if threshold_bin is None:
        return None
    index, above_bin = threshold_bin
    return _trim(low + index, count - above - above_bin, int(histogram[index]), stop_at_first=True)


def _exact_trim(bits: np.ndarray, count: int) -> Trim:
    """Return the trim of a tensor whose magnitude bits are all in memory."""
    if count == 0:
        return Trim(INFINITE)
    threshold = int(np.partition(bits, len(bits) - count)[len(bits) - count])
    return _trim(threshold, count - int((bits > threshold).sum()), int((bits == threshold).sum()), True)


def _trim(threshold: int, ties: int, equal: int, stop_at_first: bool) -> Trim:
    """Return a trim that keeps the first `ties` of `equal` elements at the threshold, or all of them."""
    return Trim(threshold, ties if stop_at_first and ties < equal else ALL_TIES)


def joint_trims(groups: Iterable[Group], densities: Sequence[float], stop_at_first: bool = False) -> list[Trim]:
    """Return one trim per brick, over the elements of all `groups` together: one tensor, or a whole model.

    This iterates over the groups twice. A trim over a model keeps every value equal to the threshold, because the tensors are
    read in no fixed order.
    """
    high = _histograms(groups, [None] * len(densities))
    counts = [keep_count(int(histogram.cpu().numpy().sum()), density) for histogram, density in zip(high, densities, strict=True)]
    bins = [find(histogram, count) or (0, 0) for histogram, count in zip(high, counts, strict=True)]
    low = _histograms(groups, [upper for upper, _ in bins])
    result = []
    for (upper, above), histogram, count in zip(bins, low, counts, strict=True):
        threshold_bin = find(histogram, count - above) if count else None
        if threshold_bin is None:
            result.append(Trim(INFINITE))
            continue
        lower, above_lower = threshold_bin
        result.append(_trim((upper << _LOW_BITS) | lower, count - above - above_lower, int(histogram[lower]), stop_at_first))
    return result


def _histograms(groups: Iterable[Group], prefixes: Sequence[int | None]) -> list[Tensor]:
    """Count the upper bits, or the lower bits of the values whose upper bits equal the prefix, in int64."""
    counts = [np.zeros(1 << (_HIGH_BITS if p is None else _LOW_BITS), np.int64) for p in prefixes]
    for group in groups:
        for block in group.blocks():
            for count, prefix, values in zip(counts, prefixes, block.deltas, strict=True):
                count += _counted(values, prefix, len(count))
    return [cast("Tensor", Array(count, "I64")) for count in counts]


def _counted(values: Tensor, prefix: int | None, bins: int) -> np.ndarray:
    """Return the counts of the upper bits of a block's magnitudes, or of the lower bits below a prefix."""
    array = as_array(values)
    if array is not None:
        bits = array.data.view(np.int32).ravel() & np.int32(0x7FFFFFFF)
        if prefix is None:
            return np.bincount(bits >> _LOW_BITS, minlength=bins)
        return np.bincount(bits[bits >> _LOW_BITS == prefix] & (1 << _LOW_BITS) - 1, minlength=bins)
    tensor = magnitude_bits(values).view(-1)
    chosen = tensor.bitwise_right_shift_(_LOW_BITS) if prefix is None else _low_bits(tensor, prefix)
    counted: np.ndarray = torch.bincount(chosen, minlength=bins).cpu().numpy()
    return counted


def _low_bits(bits: Tensor, prefix: int) -> Tensor:
    """Return the lower bits of the values whose upper bits equal the prefix; overwrites `bits`."""
    bits.sub_(prefix << _LOW_BITS)
    return bits[(bits >= 0) & (bits < 1 << _LOW_BITS)]

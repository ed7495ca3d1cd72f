"""Keep the largest share of a delta by magnitude: exact selection by counting, in any number of blocks.

The magnitude bits of a float32 order like the numbers themselves, so counting them finds the k-th largest without a sort. A
sample says between which values the threshold must lie; one pass counts what is above and, one by one, what is between. Only
where the sample misleads, or for a threshold over a whole model, two passes count the upper 16 bits and then the lower 15.
Among values equal to the threshold the first ones are kept, so the result does not depend on a sort's order or on the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.registry import Block, Group
from workbench.weights import kernels
from workbench.weights.kernels import ALL_TIES, INFINITE, magnitude_bits

_HIGH_BITS, _LOW_BITS = 16, 15
_SMALL = 1 << 18
# 2 MiB of counters a brick; five standard errors of the sample's quantile are less for a normal delta.
_WINDOW = 1 << 19
_ERRORS = 5
_PLACES = 48


class Trim:
    """Zeroes what is below a threshold; to be called on the blocks of a tensor in order, from its start as often as needed.

    Args:
        threshold: Magnitude bits of the smallest kept value.
        ties: How many values equal to the threshold are kept, first ones first; None: all of them.
    """

    def __init__(self, threshold: int, ties: int | None) -> None:
        self.threshold = threshold
        self.ties = ties
        self._left = 0

    def __call__(self, values: Tensor, start: int) -> Tensor:
        """One block [rows, cols] trimmed, in place; `start` is its first row."""
        if self.threshold == 0:
            return values  # keeps everything that is not zero already
        if self.ties is None:
            kernels.trim(values, self.threshold, ALL_TIES)
        else:
            self._left = kernels.trim(values, self.threshold, self.ties if start == 0 else self._left)
        return values


def keep_count(numel: int, density: float) -> int:
    """How many of `numel` elements a density keeps: rounded down as mergekit and PEFT do, but one at least where it is not 0."""
    return min(numel, max(1, int(density * numel))) if density > 0 else 0


def trims(group: Group, densities: Sequence[float]) -> list[Trim]:
    """One trim a brick, over the elements of one tensor. Reads a sample, and the tensor once; rarely twice more."""
    numel = group.spec.numel
    counts = [keep_count(numel, density) for density in densities]
    if numel <= _SMALL:
        bits = (
            np.concatenate([_bits(block) for block in group.blocks()], axis=1) if numel else np.zeros((len(counts), 0), np.int32)
        )
        return [_exact(row, count) for row, count in zip(bits, counts, strict=True)]
    sample = np.concatenate([_bits(block) for block in _sample(group)], axis=1)
    places = [_place(row, count / numel) for row, count in zip(sample, counts, strict=True)]
    tables = [torch.zeros(width, dtype=torch.int32, device=group.device) for _, width in places]
    above = [0] * len(counts)
    for block in group.blocks():
        for i, delta in enumerate(block.deltas):
            above[i] += kernels.window(delta, places[i][0], tables[i])
    found = [_inside(low, table, count, more) for (low, _), table, count, more in zip(places, tables, counts, above, strict=True)]
    if all(trim is not None for trim in found):
        return [trim for trim in found if trim is not None]
    return [trim or other for trim, other in zip(found, joint_trims([group], densities, stop_at_first=True), strict=True)]


def _bits(block: Block) -> np.ndarray:
    return np.stack([magnitude_bits(delta).view(-1).cpu().numpy() for delta in block.deltas])


def _sample(group: Group) -> Iterator[Block]:
    """A 32nd of the tensor, 128 Ki to 1 Mi elements: some rows at each of 48 even distances."""
    rows, cols = group.spec.rows, group.spec.cols
    step = max(1, min(max(group.spec.numel // 32, 1 << 17), 1 << 20) // (_PLACES * cols))
    for start in range(0, rows, max(step, rows // _PLACES)):
        yield group.block(start, min(start + step, rows))


def _place(sample: np.ndarray, share: float) -> tuple[int, int]:
    """Where the threshold of a density must lie: lowest bits and width, from a sample's order statistics."""
    size = len(sample)
    margin = _ERRORS * math.sqrt(size * share * (1 - share)) + 16
    ranks = [min(size - 1, max(0, round(size * (1 - share) + side))) for side in (-margin, 0, margin)]
    low, middle, high = (int(v) for v in np.partition(sample, ranks)[ranks])
    if high - low >= _WINDOW:
        low = max(low, middle - _WINDOW // 2)
    return low, min(high - low + 1, _WINDOW)


def _inside(low: int, table: Tensor, count: int, above: int) -> Trim | None:
    """The trim whose threshold lies in a counted window; None where it lies elsewhere."""
    if count == 0:
        return Trim(INFINITE, None)
    counts = table.cpu().numpy()
    if not above < count <= above + int(counts.sum(dtype=np.int64)):
        return None
    index, more = _find(counts, count - above)
    return _trim(low + index, count - above - more, int(counts[index]), True)


def _exact(bits: np.ndarray, count: int) -> Trim:
    """The trim of a tensor whose bits are all in memory."""
    if count == 0:
        return Trim(INFINITE, None)
    threshold = int(np.partition(bits, len(bits) - count)[len(bits) - count])
    return _trim(threshold, count - int((bits > threshold).sum()), int((bits == threshold).sum()), True)


def _trim(threshold: int, ties: int, equal: int, stop_at_first: bool) -> Trim:
    return Trim(threshold, ties if stop_at_first and ties < equal else None)


def joint_trims(groups: Iterable[Group], densities: Sequence[float], stop_at_first: bool = False) -> list[Trim]:
    """One trim a brick, over the joint elements of all `groups`: one tensor, or a whole model. Iterates twice.

    A model-wide trim keeps every value equal to the threshold, since blocks of several tensors have no order.
    """
    high = [histogram.numpy() for histogram in _histograms(groups, [None] * len(densities))]
    counts = [keep_count(int(histogram.sum()), density) for histogram, density in zip(high, densities, strict=True)]
    bins = [_find(histogram, count) for histogram, count in zip(high, counts, strict=True)]
    low = [histogram.numpy() for histogram in _histograms(groups, [upper for upper, _ in bins])]
    found = []
    for (upper, above), histogram, count in zip(bins, low, counts, strict=True):
        if count == 0:
            found.append(Trim(INFINITE, None))
            continue
        lower, more = _find(histogram, count - above)
        found.append(_trim((upper << _LOW_BITS) | lower, count - above - more, int(histogram[lower]), stop_at_first))
    return found


def _histograms(groups: Iterable[Group], prefixes: Sequence[int | None]) -> list[Tensor]:
    """Counts of the upper bits, or of the lower bits among the values whose upper bits are the prefix."""
    counts = [torch.zeros(1 << (_HIGH_BITS if p is None else _LOW_BITS), dtype=torch.int64) for p in prefixes]
    for group in groups:
        for block in group.blocks():
            for count, prefix, values in zip(counts, prefixes, block.deltas, strict=True):
                bits = magnitude_bits(values).view(-1)
                chosen = bits.bitwise_right_shift_(_LOW_BITS) if prefix is None else _low_bits(bits, prefix)
                count.add_(torch.bincount(chosen, minlength=len(count)).cpu())
    return counts


def _low_bits(bits: Tensor, prefix: int) -> Tensor:
    """Lower bits of the values whose upper bits are the prefix; overwrites `bits`."""
    bits.sub_(prefix << _LOW_BITS)
    return bits[(bits >= 0) & (bits < 1 << _LOW_BITS)]


def _find(histogram: np.ndarray, count: int) -> tuple[int, int]:
    """The bin of the `count`-th largest value, and how many values lie in bins above it."""
    from_top = np.cumsum(histogram[::-1], dtype=np.int64)
    index = min(int(np.searchsorted(from_top, max(1, count))), len(histogram) - 1)
    above = int(from_top[index - 1]) if index else 0
    return len(histogram) - 1 - index, above

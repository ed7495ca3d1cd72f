"""Keep the largest share of a delta by magnitude: exact selection by histogram, in any number of blocks.

The magnitude bits of a float32 order like the numbers themselves, so counting them finds the k-th largest without a sort:
one pass over the upper 16 bits, one over the lower 15 inside the bin that holds the threshold. Among values equal to the
threshold the first ones are kept, so the result does not depend on a sort's order or on the size of the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.registry import Group

_HIGH_BITS, _LOW_BITS = 16, 15


class Trim:
    """Zeroes what is below a threshold; to be called on the blocks of a tensor in order, from its start as often as needed.

    Args:
        threshold: Magnitude bits of the smallest kept value.
        ties: How many values equal to the threshold are kept, first ones first; None: all of them.
    """

    def __init__(self, threshold: int, ties: int | None) -> None:
        self.threshold = threshold
        self.ties = ties
        self._left = ties or 0
        # |x| > below is |x| >= threshold: the next smaller float32.
        self._below = torch.tensor(max(0, threshold - 1), dtype=torch.int32).view(torch.float32).item()

    def __call__(self, values: Tensor, start: int) -> Tensor:
        """One block [rows, cols] trimmed; `start` is its first row."""
        if self.threshold == 0:
            return values  # keeps everything that is not zero already
        if self.ties is None:
            return torch.nn.functional.hardshrink(values, self._below)
        if start == 0:
            self._left = self.ties
        bits = magnitude_bits(values)
        equal = (bits == self.threshold).view(-1)
        keep = (bits > self.threshold).view(-1).logical_or_(equal & (equal.cumsum(0) <= self._left))
        self._left -= min(self._left, int(equal.sum()))
        return values.mul_(keep.view(values.shape))


def magnitude_bits(values: Tensor) -> Tensor:
    """|x| of float32 values as integers of the same order, int32."""
    return values.view(torch.int32) & 0x7FFFFFFF


def keep_count(numel: int, density: float) -> int:
    """How many of `numel` elements a density keeps: rounded, as few as none."""
    return min(numel, max(0, round(numel * density)))


def trims(groups: Iterable[Group], densities: Sequence[float], stop_at_first: bool = True) -> list[Trim]:
    """One trim a brick, over the joint elements of all `groups`: one tensor, or a whole model. Iterates twice.

    A model-wide trim keeps every value equal to the threshold, since blocks of several tensors have no order.
    """
    high = _histograms(groups, [None] * len(densities))
    counts = [keep_count(int(histogram.sum()), density) for histogram, density in zip(high, densities, strict=True)]
    bins = [_find(histogram, count) for histogram, count in zip(high, counts, strict=True)]
    low = _histograms(groups, [upper for upper, _ in bins])
    return [_trim(upper, histogram, count, above, stop_at_first)
            for (upper, above), histogram, count in zip(bins, low, counts, strict=True)]  # fmt: skip


def _trim(upper: int, histogram: Tensor, count: int, above: int, stop_at_first: bool) -> Trim:
    if count == 0:
        return Trim(0x7F800000, None)  # infinity: nothing reaches it
    lower, above_in_bin = _find(histogram, count - above)
    ties = count - above - above_in_bin
    partly = stop_at_first and ties < int(histogram[lower])
    return Trim((upper << _LOW_BITS) | lower, ties if partly else None)


def _histograms(groups: Iterable[Group], prefixes: Sequence[int | None]) -> list[Tensor]:
    """Counts of the upper bits, or of the lower bits among the values whose upper bits are the prefix."""
    counts = [torch.zeros(1 << (_HIGH_BITS if p is None else _LOW_BITS), dtype=torch.int64) for p in prefixes]
    for group in groups:
        for block in group.blocks():
            for count, prefix, values in zip(counts, prefixes, block.deltas, strict=True):
                bits = magnitude_bits(values).view(-1)
                chosen = bits.bitwise_right_shift_(_LOW_BITS) if prefix is None else _inside(bits, prefix)
                count.add_(torch.bincount(chosen, minlength=len(count)).cpu())
    return counts


def _inside(bits: Tensor, prefix: int) -> Tensor:
    """Lower bits of the values whose upper bits are the prefix; overwrites `bits`."""
    bits.sub_(prefix << _LOW_BITS)
    if bits.device.type != "cpu":
        return bits[(bits >= 0) & (bits < 1 << _LOW_BITS)]
    unsigned = bits.numpy().view(np.uint32)  # one comparison instead of two, and a selection at a third of torch's cost
    return torch.from_numpy(unsigned[unsigned < 1 << _LOW_BITS].view(np.int32))


def _find(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin of the `count`-th largest value, and how many values lie in bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    index = min(int(torch.searchsorted(from_top, max(1, count))), len(histogram) - 1)
    above = int(from_top[index - 1]) if index else 0
    return len(histogram) - 1 - index, above

"""Average precision and area under the ROC curve of many scores at once.

Both follow scikit-learn's definitions: equal scores form one threshold. AP = Σₙ (Rₙ − Rₙ₋₁) Pₙ over thresholds in descending order;
AUC is the probability that a positive item has a higher score than a negative one, with ties counted as one half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workbench.lazy import torch

# Log2 histograms: sixteen bins for each power of two from 2^-14 to 2^4; smaller and larger values fall into the first and the last bin.
LOWEST, PER_OCTAVE, BINS = -14, 16, 288

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ranked:
    """Ranks of items by descending score, from 1, for many units.

    Attributes:
        last: [units, items] int32: the worst rank among items with the same score.
        middle: [units, items] float64: the mean rank of items with the same score.
        ties: Whether any scores of a unit are equal.
    """

    last: NDArray[np.int32]
    middle: NDArray[np.float64]
    ties: bool

    @classmethod
    def of(cls, scores: NDArray[np.floating[Any]]) -> Ranked:
        """Rank the items of each unit.

        Args:
            scores: [items, units].

        Raises:
            ValueError: If a score is NaN.
        """
        if np.isnan(scores).any():
            raise ValueError("expected scores without NaN")
        rows = -np.ascontiguousarray(scores.T)
        order = np.argsort(rows, axis=1)
        ordered = np.take_along_axis(rows, order, 1)
        position = np.broadcast_to(np.arange(1, rows.shape[1] + 1, dtype=np.int32), rows.shape)
        begins = np.ones(rows.shape, bool)
        begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        ties = not bool(begins.all())
        first = last = position
        if ties:
            ends = np.ones(rows.shape, bool)
            ends[:, :-1] = begins[:, 1:]
            first = np.maximum.accumulate(np.where(begins, position, 0), 1)
            last = np.minimum.accumulate(np.where(ends, position, rows.shape[1])[:, ::-1], 1)[:, ::-1]
        ranks, middle = np.empty(rows.shape, np.int32), np.empty(rows.shape)
        np.put_along_axis(ranks, order, last, 1)
        np.put_along_axis(middle, order, (first + last) / 2, 1)
        return cls(ranks, middle, ties)

    def average_precision(self, labels: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the average precision [labels, units].

        A positive item at rank r, the k-th among the positive ones, adds k / r: the precision at its threshold.

        Args:
            labels: [labels, items]. Each label needs a positive item.
        """
        return np.stack([self._average_precision(label) for label in labels])

    def _average_precision(self, label: NDArray[np.bool_]) -> NDArray[np.float64]:
        ranks = np.sort(self.last[:, label], axis=1)
        count = ranks.shape[1]
        hits = np.broadcast_to(np.arange(1, count + 1, dtype=np.float64), ranks.shape)
        if self.ties:  # all positive items of one threshold count
            ends = np.ones(ranks.shape, bool)
            ends[:, :-1] = ranks[:, 1:] != ranks[:, :-1]
            hits = np.minimum.accumulate(np.where(ends, hits, count)[:, ::-1], 1)[:, ::-1]
        return np.asarray((hits / ranks).sum(1) / count)

    def auc(self, labels: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the area under the ROC curve [labels, units].

        Args:
            labels: [labels, items]. Each label needs a positive and a negative item.
        """
        n, positives = labels.shape[1], labels.sum(1, dtype=np.float64)[:, None]
        # Items below each positive item, ties counted as one half, without the positive items among them.
        beaten = n * positives - labels.astype(np.float64) @ self.middle.T - positives * (positives - 1) / 2
        return np.asarray(beaten / (positives * (n - positives)))


def log_bins(values: Tensor) -> Tensor:
    """Return the bin of each non-negative value, int64."""
    exponent = torch.log2(values.float().clamp_min(2.0**LOWEST))
    return ((exponent - LOWEST) * PER_OCTAVE).long().clamp_(0, BINS - 1)


def histogram_average_precision(counts: Tensor, totals: Tensor) -> Tensor:
    """Return average precision from histograms of scores, float64: its expectation if the items of a bin are in random order.

    In a bin of c items, p of them positive, below n items of which h are positive, the item at position i is positive with probability
    p / c, and the precision there is then (h + 1 + (p - 1)(i - 1) / (c - 1)) / (n + i) on average. The sum over i has a closed form with
    harmonic numbers.

    Args:
        counts: Positive items by bin [..., bins].
        totals: All items by bin [..., bins].
    """
    positive, items = counts.double().flip(-1), totals.double().flip(-1)
    hits, seen = positive.cumsum(-1) - positive, items.cumsum(-1) - items
    slope = (positive - 1).clamp_min(0) / (items - 1).clamp_min(1)
    harmonic = torch.digamma(seen + items + 1) - torch.digamma(seen + 1)
    precision = (hits + 1 - slope * (seen + 1)) * harmonic + slope * items
    return (positive / items.clamp_min(1) * precision).sum(-1) / positive.sum(-1).clamp_min(1)

"""Average precision and AUC of many neurons at once, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from workbench.emergent.ranking import BINS, Ranked, histogram_average_precision, log_bins


@pytest.mark.parametrize("values", ["distinct", "few values", "zeros", "one value"])
def test_equals_scikit_learn(values: str) -> None:
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=(211, 40)).astype(np.float32)
    if values == "few values":
        scores = rng.integers(0, 7, scores.shape).astype(np.float32)
    elif values == "zeros":
        scores *= rng.random(scores.shape) < 0.2
    elif values == "one value":
        scores[:] = 1.0
    labels = rng.random((3, 211)) < np.array([0.5, 0.1, 0.01])[:, None]
    labels[:, 0] = True
    ranked = Ranked.of(scores)
    precision, area = ranked.average_precision(labels), ranked.auc(labels)
    assert precision.shape == area.shape == (3, 40)
    for label, precisions, areas in zip(labels, precision, area, strict=True):
        for unit in range(40):
            assert precisions[unit] == pytest.approx(average_precision_score(label, scores[:, unit]), abs=1e-12)
            assert areas[unit] == pytest.approx(roc_auc_score(label, scores[:, unit]), abs=1e-12)
    assert ranked.ties == (values != "distinct")


def test_histograms_are_near_the_exact_scores() -> None:
    rng = np.random.default_rng(1)
    scores = torch.from_numpy(rng.lognormal(-2, 1.5, (700, 60)).astype(np.float32))
    label = torch.from_numpy(rng.random(700) < 1 / 7)
    scores[label] *= torch.linspace(1, 6, 60)  # from no relation to a strong one
    bins = torch.nn.functional.one_hot(log_bins(scores), BINS)
    counts, totals = bins[label].sum(0), bins.sum(0)
    ranked = Ranked.of(scores.numpy())
    exact = ranked.average_precision(label.numpy()[None])[0]
    assert np.abs(histogram_average_precision(counts, totals).numpy() - exact).max() < 0.01
    assert exact.max() > 0.5


def test_bins_hold_all_values() -> None:
    values = torch.tensor([0.0, 1e-9, 2.0**-14, 2.0**-13.7, 1.0, 1.19, 15.9, 1e6])
    assert log_bins(values).tolist() == [0, 0, 0, 4, 224, 228, 287, 287]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Ranked.of(np.array([[1.0], [np.nan]]))

"""Metrics of damage matrices: on the paper's own tables, and on matrices made by hand."""

from __future__ import annotations

import pytest
import torch

from workbench.activations.sites import sample_places
from workbench.neurons.damage import coupling, dominant_rows, row_couplings

LLAMA = torch.tensor(
    [
        [112, 6, 8, 7, 8, 4, 8],
        [10, 210, 21, 14, 10, 15, 24],
        [67, 296, 122, 81, 79, 184, 86],
        [16, 8, 7, 59, 7, 26, 10],
        [15, 3, 9, 10, 147, 9, 7],
        [13, 10, 12, 26, 5, 444, 11],
        [5, 8, 11, 7, 5, 9, 32],
    ]
).double()
MISTRAL = torch.tensor(
    [
        [118, 0, 6, 10, 7, 9, 7],
        [5, 1774, 14, 13, 4, 10, 14],
        [11, 105, 375, 19, 9, 23, 17],
        [11, 3, 8, 115, 8, 31, 9],
        [19, 4, 12, 17, 200, 14, 6],
        [377, 391, 477, 381, 241, 9243, 440],
        [3, 16, 10, 4, 3, 9, 41],
    ]
).double()


def test_published_matrices() -> None:
    """Xiao et al. 2024, figure 9: coupling .075 and .060; the diagonal is largest in 6 and in 7 of 7 rows, in 4 and 2 columns."""
    assert coupling(torch.stack([LLAMA, MISTRAL])).tolist() == pytest.approx([0.075, 0.060], abs=5e-4)
    assert dominant_rows(LLAMA).tolist() == [True, True, False, True, True, True, True]
    assert dominant_rows(MISTRAL).all()
    assert [int(dominant_rows(m.T).sum()) for m in (LLAMA, MISTRAL)] == [4, 2]


def test_ends_of_the_scale() -> None:
    assert float(coupling(torch.diag(torch.tensor([1.0, 5.0, 2.0])))) == 0
    assert float(coupling(torch.full((4, 4), 3.0))) == 1
    broken = torch.tensor([[0.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 2.0]])
    assert row_couplings(broken).tolist() == [torch.inf, 0.25, 0.5]
    assert float(coupling(broken)) == 0.5
    assert float(coupling(torch.tensor([[2.0, 1.0], [3.0, 1.0]]))) == pytest.approx((0.5 + 3) / 2), "of two rows, the mean"
    with pytest.raises(ValueError, match="square damage matrices"):
        coupling(torch.ones(2, 3))


def test_ties_do_not_dominate() -> None:
    assert dominant_rows(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [False, True]


def test_sampled_places() -> None:
    places = sample_places([3, 1, 5], 4, seed=2)
    assert places.shape == (4, 2)
    assert all(t >= 1 or i == 1 for i, t in places.tolist())
    assert sample_places([3, 1, 5], 99).tolist() == [[0, 1], [0, 2], [1, 0], [2, 1], [2, 2], [2, 3], [2, 4]]

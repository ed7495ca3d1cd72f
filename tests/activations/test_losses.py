"""Losses of items: those of each row alone, whatever stands beside it in a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds import mixtures
from worlds.planted import planted_items, planted_llama, random_rows
from worlds.tiny import live

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import cross_entropies, loss_batches, losses
from workbench.ground.errors import WorkbenchError


def alone(model: Any, row: ItemRow, first: int = 1) -> float:
    """The sum of −log p from the token `first` on, from all logits of the row."""
    tokens = torch.tensor([row.tokens])
    with torch.no_grad():
        log_p = model(input_ids=tokens).logits[0].double().log_softmax(-1)
    return -float(sum(log_p[t - 1, row.tokens[t]] for t in range(first, len(row.tokens))))


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "opt", "cohere"])
def test_batches_equal_single_rows(family: str, dense_of: Callable[[str], Path]) -> None:
    """Rows of a padded batch have the losses that they have alone, also with soft caps, scaled logits and learned positions."""
    model, rows = live(dense_of(family)), random_rows([3, 17, 9, 1, 24, 9])
    found = losses(model, rows)
    assert found.tokens.tolist() == [2, 16, 8, 0, 23, 8]
    expected = torch.tensor([alone(model, row) for row in rows], dtype=torch.float64)
    assert float(((found.sums - expected).abs() / found.tokens.clamp_min(1)).max()) <= 1e-6
    assert found.mean == pytest.approx(float(expected.sum()) / 57, abs=1e-6)


def test_mixture(tmp_path: Path) -> None:
    model, rows = live(mixtures.save_mixture("mixtral", tmp_path / "m")), random_rows([5, 20, 11])
    expected = torch.tensor([alone(model, row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(losses(model, rows).sums, expected, atol=2e-5, rtol=0)


def test_response_alone() -> None:
    model = planted_llama()
    rows = [ItemRow([6, 7, 0, 3, 9], 3), ItemRow([8, 9], 2), ItemRow([6, 1, 4], 1)]
    found = losses(model, rows, scored="response")
    assert found.tokens.tolist() == [2, 0, 2]
    assert found.sums.tolist() == pytest.approx([alone(model, rows[0], 3), 0, alone(model, rows[2], 1)], abs=1e-5)


def test_small_batches_give_the_same() -> None:
    """Few logits at a time: rows come one by one."""
    model = planted_llama()
    _, rows = planted_items()
    torch.testing.assert_close(losses(model, rows, logits=1).sums, losses(model, rows).sums, atol=1e-5, rtol=0)
    assert torch.equal(losses(model, rows).sums, losses(model, rows).sums)


def test_nothing_to_predict() -> None:
    model = planted_llama()
    with pytest.raises(WorkbenchError, match="none of the 2 items has a response whose loss"):
        losses(model, [ItemRow([6, 7], 2), ItemRow([8], 1)], scored="response")
    with pytest.raises(WorkbenchError, match="none of the 1 items has a second token"):
        losses(model, [ItemRow([6], 1)])


def test_chunks_of_cross_entropies() -> None:
    logits, wanted = torch.randn(600, 7, dtype=torch.float64), torch.randint(7, (600,))
    expected = -logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    torch.testing.assert_close(cross_entropies(logits, wanted), expected)


def test_batches_hold_every_counted_row_once() -> None:
    lengths, counts = [5, 3000, 2, 2000, 7, 3000], [4, 2999, 0, 1999, 6, 2999]
    batches = list(loss_batches(lengths, counts, 5000))
    assert sorted(i for batch in batches for i in batch) == [0, 1, 3, 4, 5]
    assert all(max(lengths[i] for i in batch) * len(batch) <= 4096 or len(batch) == 1 for batch in batches)
    assert batches == [[0, 4], [3], [1], [5]]

"""The running batch: each row has the logits of its text alone, whatever joins and leaves beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worlds.tiny import live, save_model

from workbench.serve.batch import Batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return live(save_model(tmp_path_factory.mktemp("base") / "base")).float()


class Mirror:
    """A batch beside the texts that it holds, each forwarded alone."""

    def __init__(self, model: Any) -> None:
        self.model, self.batch, self.rows = model, Batch(model), list[list[int]]()
        self.draw = torch.Generator().manual_seed(0)

    def words(self, count: int) -> list[int]:
        return torch.randint(3, 60, (count,), generator=self.draw).tolist()

    def alone(self, row: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([row])).logits[0]  # type: ignore[no-any-return]

    def add(self, *lengths: int, every: bool = False) -> None:
        new = [self.words(length) for length in lengths]
        found = self.batch.join(new, None, [every] * len(new))
        for row, logits in zip(new, found, strict=True):
            torch.testing.assert_close(logits, self.alone(row) if every else self.alone(row)[-1:], rtol=0, atol=1e-5)
        self.rows += new

    def step(self) -> None:
        tokens = self.words(len(self.rows))
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens, strict=True)]
        for row, logits in zip(self.rows, self.batch.step(tokens), strict=True):
            torch.testing.assert_close(logits, self.alone(row)[-1], rtol=0, atol=1e-5)

    def keep(self, *rows: int) -> None:
        self.batch.keep(rows)
        self.rows = [self.rows[i] for i in rows]


def test_rows_join_and_leave(model: Any) -> None:
    mirror = Mirror(model)
    mirror.add(7, 3)
    for _ in range(3):
        mirror.step()
    mirror.add(12, every=True)
    mirror.step()
    mirror.keep(1, 2)
    mirror.step()
    mirror.keep(0)
    assert mirror.batch._places.shape == (1, 3 + 5), "padding that no row needs is gone"
    mirror.add(1, 9)
    mirror.step()
    mirror.keep()
    assert len(mirror.batch) == 0
    mirror.add(4)
    mirror.step()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_joins_steps_and_leaves(model: Any, seed: int) -> None:
    mirror = Mirror(model)
    mirror.draw.manual_seed(seed)
    for _ in range(25):
        what, size = torch.randint(0, 3, (2,), generator=mirror.draw).tolist()
        if what == 0 or not mirror.rows:
            mirror.add(*(1 + size + n for n in range(1 + size)), every=bool(size))
        elif what == 1:
            mirror.step()
        else:
            order = torch.randperm(len(mirror.rows), generator=mirror.draw).tolist()
            mirror.keep(*order[: len(order) - 1])

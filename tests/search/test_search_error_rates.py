"""How often the test of a search errs, and what it says of flattery: simulated searches without a difference, seeded.

The functions that split items, choose and compare are the search's own. At a rate of 5 % the standard error of 2,000 searches is 0.5 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from workbench.scores.plan import Item
from workbench.search.halves import split
from workbench.search.objective import Answers, Objective, Rival, Term, front, gap

pytestmark = pytest.mark.nightly
SEARCHES = 2000
CANDIDATES = 40
KEY = ("s", "t")
OBJECTIVE = Objective("s", (Term(KEY, "acc", 1.0),))
SIZES = {
    "20 clusters": lambda rng: [12] * 20,
    "24 unequal clusters": lambda rng: rng.integers(4, 17, 24).tolist(),
    "40 lognormal clusters": lambda rng: np.ceil(rng.lognormal(1.4, 0.8, 40)).astype(int).tolist(),
    "240 items alone": lambda rng: [1] * 240,
}


def searched(rng: np.random.Generator, number: int, sizes: Sequence[int], by_cluster: float) -> tuple[Any, Any]:
    """Gaps of the best of the candidates from a control, on search and on test items.

    No candidate differs from the control on average: by symmetry what each gains in a cluster is as often positive as negative.
    """
    labels = np.repeat(np.arange(len(sizes)), sizes)
    items = [Item(f"{number}-{i}", f"{number}-{c}") for i, c in enumerate(labels)]
    place = {item.id: i for i, item in enumerate(items)}
    hard = rng.normal(size=len(items)) + 0.7 * rng.normal(size=len(sizes))[labels]
    noise = 0.4 * rng.normal(size=(1 + CANDIDATES, len(items)))
    noise += by_cluster * rng.normal(size=(1 + CANDIDATES, len(sizes)))[:, labels]
    right = (hard + noise > 0).astype(float)

    def answers(row: int, half: Sequence[Item]) -> Answers:
        return Answers({KEY: {"acc": right[row, [place[i.id] for i in half]]}}, {KEY: [i.cluster for i in half]})

    seen, kept = split(items, 0.5)
    best = front(Rival.of(str(row), answers(row, seen), [OBJECTIVE]) for row in range(1, 1 + CANDIDATES))[0]
    return gap(answers(0, seen), best.answers, OBJECTIVE), gap(answers(0, kept), answers(int(best.name), kept), OBJECTIVE)


@pytest.mark.parametrize("shape", SIZES)
def test_luck_on_search_items_is_no_verdict(shape: str) -> None:
    """The best of 40 equal candidates is "better" or "worse" on test items at most at the level, and its flattery is said in full."""
    rng = np.random.default_rng(len(shape))
    found = [searched(rng, i, SIZES[shape](rng), 0.5) for i in range(SEARCHES)]
    verdicts = [test.verdict() for _, test in found]
    better, worse = (verdicts.count(word) / SEARCHES for word in ("better", "worse"))
    assert better + worse <= 0.065
    assert better <= 0.035, "one side of a test at 5 %"
    flattery = np.array([seen.diff for seen, _ in found])  # the true difference is 0
    told = np.array([seen.diff - test.diff for seen, test in found])
    assert flattery.mean() > 0.03
    assert told.mean() == pytest.approx(flattery.mean(), abs=4 * np.std(told - flattery) / np.sqrt(SEARCHES))
    assert told.mean() == pytest.approx(flattery.mean(), rel=0.06)

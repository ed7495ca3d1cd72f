"""How items of a search are split: by whole clusters, near the share, and with a word on what the test cannot tell."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from worlds.commands import document
from worlds.project import Project
from worlds.search_world import SPACE, lay_out, searched

from workbench.scores.plan import Item
from workbench.search.halves import Stages, split, warnings_of
from workbench.search.objective import Objective, Term

SHAPES = {
    "alone": [1] * 200,
    "equal": [12] * 20,
    "few": [24] * 10,
    "two": [30, 10],
    "lognormal": [max(1, round(random.Random(i).lognormvariate(1.5, 1.0))) for i in range(40)],
    "zipf": [max(1, 60 // (i + 1)) for i in range(40)],
    "half in one": [120, *[3] * 40],
}


def items_of(sizes: Sequence[int]) -> list[Item]:
    """Clusters of these sizes, their items mixed."""
    found = [Item(f"i{c}-{i}", f"c{c}") for c, size in enumerate(sizes) for i in range(size)]
    random.Random(0).shuffle(found)
    return found


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_clusters_stay_whole(shape: str, share: float) -> None:
    """Each on one side, about `share` of the items on the test's, both sides in use, and the same whatever the order of the data."""
    items = items_of(SHAPES[shape])
    seen, kept = split(items, share)
    assert {i.cluster for i in seen} & {i.cluster for i in kept} == set()
    assert sorted(i.id for i in [*seen, *kept]) == sorted(i.id for i in items)
    assert seen
    assert kept
    sizes = Counter(i.cluster for i in items)
    second = sorted(sizes.values())[-2]
    assert abs(len(kept) - share * len(items)) <= max(second / 2, min(SHAPES[shape]), 1) or shape == "two"
    assert split(list(reversed(items)), share) == (seen, kept)


@pytest.mark.parametrize("number", [2, 5, 40])
def test_clusters_of_one_item_are_split_by_number(number: int) -> None:
    seen, kept = split(items_of([1] * number), 0.5)
    assert len(kept) == round(0.5 * number)
    assert len(seen) == number - len(kept)
    more = split(items_of([1] * 40), 0.25)[1]
    assert {i.id for i in more} < {i.id for i in split(items_of([1] * 40), 0.5)[1]}


def test_the_largest_cluster_is_searched_on() -> None:
    """It would outweigh all others of the test half."""
    for large in (30, 120, 500):
        seen, kept = split([*items_of([2] * 40), *(Item(f"x{i}", "x") for i in range(large))], 0.5)
        assert sum(i.cluster == "x" for i in seen) == large
        assert len({i.cluster for i in kept}) >= 8


def test_stages_see_many_clusters() -> None:
    """Items of the search half come in the order of a hash of their own, not cluster after cluster."""
    seen, _ = split(items_of([20] * 24), 0.5)
    assert len({i.cluster for i in seen[:25]}) >= 9


def test_one_cluster_and_one_item() -> None:
    seen, kept = split(items_of([10]), 0.3)
    assert (len(seen), len(kept)) == (7, 3)
    assert split(items_of([1]), 0.5) == ([], items_of([1])), "nothing is left to search on, which `prepare` refuses"


def told(sizes: Mapping[str, Sequence[int]], share: float = 0.5, names: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    halves = {task: split(items_of(found), share) for task, found in sizes.items()}
    plans: list[Any] = [
        SimpleNamespace(suite=SimpleNamespace(suite="s"), items={t: h[side] for t, h in halves.items()}) for side in (0, 1)
    ]
    objectives = [
        Objective(name, tuple(Term(("s", t), "acc", 1.0) for t in tasks)) for name, tasks in (names or {"s": list(sizes)}).items()
    ]
    return warnings_of(Stages(((plans[0],),), (plans[1],)), objectives)


def test_what_the_test_cannot_tell() -> None:
    assert told({"t": [12] * 16, "u": [1] * 200}) == []
    assert told({"t": [24] * 10}) == [
        "task 't' has 5 of its 10 clusters in the test half, but a verdict needs 8: the verdict on 's' is always \"cannot tell\". "
        "Score more clusters, or set `test: 0.8`."
    ]
    assert told({"t": [24] * 10}, 0.8) == [], "what the warning advises helps"
    (few,) = told({"t": [24] * 8})
    assert few.endswith('is always "cannot tell". Score more clusters.')
    (one,) = told({"t": [24], "u": [1] * 40}, names={"a": ["t"], "b": ["u", "t"]})
    assert one.startswith(
        "task 't' has only one cluster, which is split between search and test: the verdict on 'a' and 'b' is always \"cannot tell\""
    )
    (uneven,) = told({"t": [100, 90, *[1] * 160]})
    assert uneven == (
        "task 't' has 86 clusters in the test half, and the largest has 90 of 175 items: they are worth only 3.7 clusters of equal size, and "
        "the test of 's' detects only large differences."
    )


def test_stages_have_the_items_of_their_suites_and_a_key_of_all_plans() -> None:
    own, other, test, guard = [
        SimpleNamespace(suite=SimpleNamespace(suite=suite), items={"t": items_of([number] * 2)}, digest=f"{suite}{number}")
        for number, suite in ((1, "s"), (2, "u"), (3, "s"), (4, "s"))
    ]
    plans: list[Any] = [((own,), (own, other)), (test, other), (guard,)]
    stages = Stages(*plans)
    assert {half: len(items) for half, items in stages.halves("s", "t").items()} == {"search": 4, "test": 6}
    assert (stages.items.search, stages.items.test) == (2 + 2 + 4, 6 + 4)
    counts = stages.counts(
        Objective("a", (Term(("s", "t"), "acc", 1.0), Term(("s", "t"), "f1", 1.0), Term(("u", "t"), "acc", 1.0)))
    )
    assert (counts["items"].search, counts["items"].test, counts["clusters"].search, counts["clusters"].test) == (8, 10, 4, 4)
    keys = {Stages(*plans).key, Stages(*plans[:2]).key, Stages(plans[0], (test,)).key, Stages(plans[0][:1], plans[1]).key}
    assert len(keys) == 4
    assert Stages(*plans[:2], ()).key == Stages(*plans[:2]).key, "a search without guarded tasks has the key of before"


def test_a_task_whose_items_are_used_up_is_left_out_of_later_stages(project: Project, cwd: Path) -> None:
    """60 items beside 200: the second stage has items of the larger task alone, and every candidate is scored on what the plans list."""
    lay_out(project, items=60, more=140)
    space = searched(SPACE, ", objective: [pick, say], trials: 2, sampler: random").replace("[8, 16]", "[40, 100]")
    project.write(space)
    found = document("search", "recipes/test.yaml")
    assert found["stages"] == [40 + 30, 60]
    assert found["items"] == {"search": 100 + 30, "test": 100 + 30}
    assert {trial["items"] for trial in found["trials"]} <= {70, 130}

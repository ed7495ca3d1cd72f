"""A comparison counts what was scored before on the same items, also if it does not name it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worlds.decided import AVERAGE, BRICK, made
from worlds.stored_scores import BASE, right, stored

from workbench.compare.compare import compare
from workbench.compare.tables import suites_of, tables_of
from workbench.compare.warnings import looked_at
from workbench.scores.store import Configuration, Scores, ScoreStore

SUITE: dict[str, Any] = {"roles": {"facts": "retention"}, "tolerance": 0.1, "clusters": 24}
TASKS = ("add", "facts")


def scored(store: ScoreStore, number: int, level: float = 0.5, **suite: Any) -> list[Scores]:
    """Store the base and this number of configurations that are equal to it but for chance."""
    rng = np.random.default_rng(3)
    lines = {c: (rng.random((2, 240)) < level) * 1.0 for c in (BASE, *(made(f"c{i}", i) for i in range(1, number + 1)))}
    return stored(store, {c: dict(zip(TASKS, x.tolist(), strict=True)) for c, x in lines.items()}, **{**SUITE, **suite})


def chosen(scores: list[Scores], *names: str) -> list[Scores]:
    return [s for s in scores if s.configuration.name in ("base", *names)]


def test_two_of_twenty_get_the_verdicts_that_they_have_among_all(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores = scored(store, 20)
    whole, part = compare(store, scores).to_dict(), compare(store, chosen(scores, "c3", "c7")).to_dict()
    assert part["family"]["looked_at"] == part["recommendation"]["family"]["looked_at"] == 18
    assert part["family"]["text"].endswith(
        "x 2 configurations against base; 1 guarded task tested separately; 18 more scored on these items count too"
    )
    assert [c["name"] for c in part["configurations"]] == ["base", "c3", "c7"]
    assert list(part["flips"]) == ["c3", "c7"]
    by_row = {(row["configuration"], row["task"]): row for row in whole["rows"]}
    assert len(part["rows"]) == 4
    losses = 0
    for row in part["rows"]:
        among = by_row[row["configuration"], row["task"]]
        assert (row["low_adj"], row["high_adj"]) == (among["low_adj"], among["high_adj"])
        losses += row["diff"] < 0
        assert row["p_adj"] < among["p_adj"] if row["diff"] < 0 and row["task"] == "add" else row == among
    assert losses
    for c in part["recommendation"]["candidates"]:
        among = next(o for o in whole["recommendation"]["candidates"] if o["configuration"] == c["configuration"])
        assert c["against_baseline"] == among["against_baseline"]
    assert part["recommendation"]["details"][-1] == (
        "18 others were scored on these items and count in the tests, because the best of 20 looks better by chance "
        "(`workbench scores ls` lists them)."
    )


def test_one_more_is_one_sentence_and_none_is_no_sentence(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores = scored(store, 3)
    one, none = (compare(store, chosen(scores, *names)).to_dict() for names in (("c1", "c2"), ("c1", "c2", "c3")))
    assert one["recommendation"]["details"][-1].startswith(
        "1 other configuration was scored on these items and counts in the tests"
    )
    assert one["family"]["text"].endswith("; 1 more scored on these items count too")
    assert none["family"]["looked_at"] == 0
    assert not [text for text in none["recommendation"]["details"] if "scored on these items" in text]


@pytest.mark.parametrize(
    ("c", "counts"),
    [
        (BRICK, True),
        (AVERAGE, True),
        (replace(made("c1", 9), name="c1"), True),  # an earlier text of a recipe that is named
        (Configuration(f"{0xC1:012x}{0:020x}", "facts in the prompt", "memory"), False),
        (replace(made("twin", 1), name="twin"), False),  # the weights of a named one
    ],
)
def test_which_configurations_count(c: Configuration, counts: bool, tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores = scored(store, 1)
    if c.digest != scores[1].configuration.digest:
        stored(store, {c: {t: right(0.5, seed=5) for t in TASKS}}, **SUITE)
    else:
        store.update(plan_of(scores[1]), scores[1].also(c))
    assert compare(store, scores).to_dict()["family"]["looked_at"] == counts


def plan_of(scores: Scores) -> Any:
    class Plan:
        suite, digest = type("S", (), {"suite": scores.suite}), scores.plan

    return Plan


def test_scores_of_other_items_or_suites_or_formats_do_not_count(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores = scored(store, 3)
    folder = store.folder(scores[0].suite, scores[0].plan)
    for other in ("toy-" + "q" * 12, "else-" + scores[0].plan[:12]):
        (tmp_path / other).mkdir()
        for file in folder.iterdir():
            (tmp_path / other / file.name).write_bytes(file.read_bytes())
    old = folder / f"{scores[3].key[:12]}.json"
    document = json.loads(old.read_text("utf-8"))
    old.write_text(json.dumps({**document, "version": 1, "rows": None}), "utf-8")
    found = compare(store, chosen(scores, "c1")).to_dict()
    assert found["family"]["looked_at"] == 1
    assert not [w for w in found["warnings"] if "Not counted" in w]


@pytest.mark.parametrize("damage", ["document", "rows"])
def test_damaged_scores_are_said_and_the_others_count(damage: str, tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores = scored(store, 4)
    path = store.folder(scores[2].suite, scores[2].plan) / f"{scores[2].key[:12]}.json"
    path = path if damage == "document" else path.with_suffix(".jsonl.gz")
    path.write_bytes(b"{")
    found = compare(store, chosen(scores, "c1")).to_dict()
    assert found["family"]["looked_at"] == 2
    (warning,) = [w for w in found["warnings"] if w.startswith("Not counted, although it may have been looked at: ")]
    assert path.name in warning


def test_scores_in_another_range_do_not_change_the_units(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores = scored(store, 1, metric="points")
    stored(store, {made("wild", 5): {"add": [7.0] * 240, "facts": right(0.5)}}, **SUITE, metric="points")
    tasks = tables_of(store, scores, settings := suites_of(store, scores, {}))
    found = looked_at(store, scores, tasks, settings)
    assert [len(t.values) for t in found.tables] == [2, 3]
    assert all(t.share for t in found.tables)
    assert compare(store, scores).to_dict()["recommendation"]["family"]["looked_at"] == 0


def test_what_was_looked_at_does_not_weaken_the_alarm(tmp_path: Path) -> None:
    """A loss is as clear as if nothing else had been scored; a gain of the same size is not."""
    store, steps = ScoreStore(tmp_path), np.arange(240)
    start = (steps % 2) * 1.0
    lines = {
        BASE: start,
        made("up", 1): np.where(steps % 40 == 0, 1.0, start),
        made("down", 2): np.where(steps % 40 == 1, 0.0, start),
    }
    named = stored(store, {c: dict.fromkeys(TASKS, x.tolist()) for c, x in lines.items()}, **{**SUITE, "clusters": 240})
    before = compare(store, named).to_dict()["rows"]
    rng = np.random.default_rng(1)
    others = {made(f"o{i}", 10 + i): dict.fromkeys(TASKS, ((rng.random(240) < 0.5) * 1.0).tolist()) for i in range(30)}
    stored(store, others, **{**SUITE, "clusters": 240})
    after = compare(store, named).to_dict()["rows"]
    told = [[(r["configuration"], r["verdict"]) for r in rows if r["task"] == "add"] for rows in (before, after)]
    assert told == [[("up", "better"), ("down", "worse")], [("up", "cannot tell"), ("down", "worse")]]
    down = next(r for r in after if r["configuration"] == "down" and r["task"] == "add")
    assert down["low_adj"] < 0 <= down["high_adj"]

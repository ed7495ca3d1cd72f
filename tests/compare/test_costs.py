"""Costs of configurations in comparisons: numbers of new documents, dashes with reasons for old and imported ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worlds.stored_scores import BASE, TIES, right, stored

from workbench.compare.compare import compare
from workbench.compare.configurations import ELSEWHERE, IMPORTED, NO_TEXT, OLDER, RESUMED, Costs
from workbench.ground.numbers import MISSING
from workbench.report.decision import cost_cells, licence, unknown_costs
from workbench.scores.documents import Measured
from workbench.scores.store import Scores, ScoreStore, TaskScores

Change = Callable[[TaskScores], dict[str, Any]]


def costs(folder: Path, change: Change, *, kind: str = "generate_until", of_all: dict[str, Any] | None = None) -> Costs:
    """The costs of `ties`, whose tasks' scores are changed."""
    store = ScoreStore(folder)
    scores = stored(
        store, {BASE: {"one": right(0.4), "two": right(0.5)}, TIES: {"one": right(0.5), "two": right(0.5)}}, kind=kind
    )

    def changed(s: Scores) -> Scores:
        tasks = {name: about.model_copy(update=change(about)) for name, about in s.tasks.items()}
        return s.model_copy(update={"tasks": tasks, **(of_all or {})})

    found = compare(store, [changed(s) if s.configuration.name == "ties" else s for s in scores]).configuration("ties")
    assert found
    return found.costs


def test_numbers_of_all_tasks_are_put_together(tmp_path: Path) -> None:
    rates = iter([(100, 10, 50.0, 5), (300, 20, 100.0, 9)])

    def change(_about: TaskScores) -> dict[str, Any]:
        tokens, answers, rate, peak = next(rates)
        return {
            "answers": answers,
            "answer_tokens": tokens,
            "seconds": 2.0,
            "measured": Measured(tokens_per_second=rate, peak_bytes=peak, peak_of=f"memory {peak}"),
        }

    found = costs(tmp_path, change)
    assert found.answer_length == pytest.approx(400 / 30)
    assert found.length_unit == "tokens"
    assert found.tokens_per_second == pytest.approx(400 / (100 / 50 + 300 / 100))
    assert (found.peak_bytes, found.peak_of) == (9, "memory 9")
    assert found.seconds == 1.0
    assert found.missing == {"licences": OLDER}


def test_older_scores_show_a_dash_with_a_word_why(tmp_path: Path) -> None:
    found = costs(tmp_path, lambda _: {"seconds": 0.5})
    assert (found.answer_length, found.length_unit) == (1.0, "words")  # the stored answers are "0.0" and "1.0"
    assert found.tokens_per_second is None
    assert found.peak_bytes is None
    assert found.missing == dict.fromkeys(("tokens_per_second", "peak_bytes", "licences"), OLDER)
    shown = cost_cells(found)
    assert [cell.text for cell in shown] == ["1.0 s", "1.0 words", MISSING, MISSING, MISSING]
    assert shown[3].note == f"Not known: {OLDER}"


def test_imported_scores_without_a_time_have_none(tmp_path: Path) -> None:
    found = costs(tmp_path, lambda _: {}, of_all={"seconds": 0.0})
    assert found.seconds is None
    assert found.missing["seconds"] == found.missing["peak_bytes"] == IMPORTED
    assert cost_cells(found)[0].text == MISSING


def test_tasks_without_texts_have_no_length_and_no_rate(tmp_path: Path) -> None:
    found = costs(tmp_path, lambda _: {"measured": Measured(peak_bytes=3, peak_of="m")}, kind="loglikelihood")
    assert found.answer_length is None
    assert found.missing == {"answer_length": NO_TEXT, "tokens_per_second": NO_TEXT, "licences": OLDER}


def test_texts_of_an_interrupted_evaluation_have_no_rate(tmp_path: Path) -> None:
    found = costs(tmp_path, lambda _: {"answers": 4, "answer_tokens": 8, "measured": Measured(resumed=True)})
    assert found.missing["tokens_per_second"] == RESUMED
    assert found.missing["peak_bytes"] == ELSEWHERE
    assert found.resumed
    assert cost_cells(found)[0].text.startswith(">")


@pytest.mark.parametrize(
    ("licences", "text"),
    [
        ({}, ""),
        ({"base": "mit", "one": "mit"}, "mit"),
        ({"base": "mit", "one": "unknown", "two": "mit"}, "mit (base, two); unknown (one)"),
    ],
)
def test_licenses_stand_in_one_line(licences: dict[str, str], text: str) -> None:
    assert licence(licences) == text


def test_reasons_are_said_once() -> None:
    nothing = dict.fromkeys(("answer_length", "length_unit", "seconds", "tokens_per_second", "peak_bytes", "peak_of"))

    def lacking(**missing: str) -> Costs:
        return Costs(**nothing, resumed=False, licences={}, missing=missing)  # type: ignore[arg-type]

    both = {"a": lacking(peak_bytes="old", tokens_per_second="old"), "b": lacking(peak_bytes="old", tokens_per_second="old")}
    assert unknown_costs(both) == ["peak memory and answer tokens/s of all configurations: old"]
    rows = {**both, "c": lacking(peak_bytes="elsewhere")}
    assert unknown_costs(rows) == ["peak memory and answer tokens/s of a, b: old", "peak memory of c: elsewhere"]

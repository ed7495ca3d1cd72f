"""Rows of the score store and the journal of a task: what is read, what is refused with its place, and what is written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import bytes_digest
from workbench.scores.files import Journal, read_rows, rows_text, write_rows

ANSWER: dict[str, Any] = {"task": "t", "id": "1", "metrics": {"acc": 1.0}, "response": "a", "loglikelihoods": [-1.0]}
ITEM: dict[str, Any] = {"task": "t", "id": "1", "cluster": "c", "prompt": "p", "choices": ["a"], "gold": 0}
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *((row, {key: 1}, f"expected a string under '{key}', found 1") for row in (ANSWER, ITEM) for key in ("task", "id")),
    *((ITEM, {key: None}, f"expected a string under '{key}', found null") for key in ("cluster", "prompt")),
    (ITEM, {"choices": "ab"}, "expected a list of strings under 'choices', found \"ab\""),
    (ITEM, {"choices": ["a", 1]}, "expected a list of strings under 'choices', found [\"a\", 1]"),
    (ITEM, {"gold": 0.5}, "expected a number or a string under 'gold', found 0.5"),
    (ITEM, {"gold": [0, "1"]}, "expected a number or a string under 'gold', found [0, \"1\"]"),
    (ANSWER, {"metrics": [1]}, "expected an object under 'metrics', found [1]"),
    (ANSWER, {"metrics": {"acc": 2}}, "item '1' of 't': acc is 2, expected a number from 0 to 1"),
    (ANSWER, {"metrics": {"x": [1, -1]}}, "item '1' of 't': x is [1, -1], expected a finite number and a weight of at least 0"),
    (ANSWER, {"metrics": {"x": []}}, "item '1' of 't': x is [], expected a finite number and a weight of at least 0"),
    (ANSWER, {"loglikelihoods": 1}, "expected a list of numbers under 'loglikelihoods', found 1"),
    (ANSWER, {"loglikelihoods": [1, "2"]}, "expected a list of numbers under 'loglikelihoods', found [1, \"2\"]"),
    (ANSWER, {"response": 1}, "expected a string under 'response', found 1"),
]


@pytest.mark.parametrize(("row", "change", "message"), BAD)
def test_bad_rows(row: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The message names file and line; rows of items have no answers and rows of answers no prompts."""
    file = tmp_path / "rows.jsonl.gz"
    write_rows(file, rows_text({"t": [row, {**row, **change}]}))
    with pytest.raises(WorkbenchError) as error:
        read_rows(file, None, "again", answers=row is ANSWER)
    assert (error.value.message, error.value.hint) == (f"{file}:2: {message}", "again")


def test_good_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    golds = [None, 1, "a", [0, 1]]
    items = [{**ITEM, "id": str(i), "gold": gold, "choices": None} for i, gold in enumerate(golds)]
    answers = [
        ANSWER,
        {**ANSWER, "response": None, "loglikelihoods": None, "metrics": {"f1": [0.5], "ppl": [-2.0, 0.0], "margin": -3}},
    ]
    for rows in (items, answers):
        data = rows_text({"t": rows})
        write_rows(file, data)
        written = file.read_bytes()
        assert read_rows(file, bytes_digest(data), "again", answers=rows is answers) == {"t": rows}
        write_rows(file, data)
        assert file.read_bytes() == written
        with pytest.raises(WorkbenchError, match="the rows changed after scoring"):
            read_rows(file, "0" * 32, "again", answers=rows is answers)


def test_a_journal_is_read_up_to_the_first_line_that_is_no_answer(tmp_path: Path) -> None:
    """A whole journal is left as it is; of a torn one, and of another configuration's, the rest is written again."""
    file = tmp_path / "t.jsonl"
    Journal(file, "d").add({0: [-1.5, True], 1: "text", 2: ["a", "b"], 3: [-2, 0]})
    whole, node = file.read_text("utf-8"), file.stat().st_ino
    done = {0: [-1.5, True], 1: "text", 2: ["a", "b"], 3: [-2, 0]}
    assert Journal(file, "d").done == done
    assert (file.read_text("utf-8"), file.stat().st_ino) == (whole, node)
    for bad in (
        "[4, [-1",
        "[4]",
        "[4, 5]",
        '["4", "x"]',
        '[true, "x"]',
        '[4, [1.5, "x"]]',
        "[4, [-1.0, 1, 2]]",
        '[4, ["a", 1]]',
        "{}",
    ):
        for end in ("", "\n", '\n[5, "late"]\n'):
            file.write_text(whole + bad + end, "utf-8")
            assert Journal(file, "d").done == done, bad
            assert file.read_text("utf-8") == whole
    assert Journal(file, "other").done == {}
    assert file.read_text("utf-8") == json.dumps([-1, "other"]) + "\n"

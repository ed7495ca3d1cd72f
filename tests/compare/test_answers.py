"""Answers of two configurations side by side: `scores items`, and the part of a comparison's document that the page shows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from worlds.stored_scores import AVERAGE, BASE, MEAN, TIES, stored

from workbench import api
from workbench.cli.app import app
from workbench.compare.answers import paired_answers, picked, side_by_side
from workbench.compare.compare import compare
from workbench.compare.tables import suites_of, tables_of
from workbench.ground.files import bytes_digest
from workbench.scores.store import Configuration, Scores, ScoreStore

N = 12
VALUES: dict[Configuration, dict[str, Sequence[float]]] = {
    BASE: {"one": [1.0] * 4 + [0.0] * 8, "two": [0.0] * 12},
    AVERAGE: {"one": [1.0] * 4 + [0.0] * 8, "two": [0.0] * 12},
    MEAN: {"one": [1.0] * 4 + [0.0] * 8, "two": [0.0] * 12},
    TIES: {"one": [0.0] * 1 + [1.0] * 7 + [0.0] * 4, "two": [0.0] * 11 + [1.0]},
}


def answers(c: Configuration, task: str, i: int) -> dict[str, Any]:
    """The text of `ties` to item 9 of the first task is another one with the same score."""
    return {"response": f"{'another' if c is TIES and (task, i) == ('one', 9) else 'text'} {VALUES[c][task][i]:g}"}


@pytest.fixture
def world(tmp_path: Path) -> tuple[ScoreStore, list[Scores]]:
    store = ScoreStore(tmp_path / "scores")
    asked = [{"choices": None, "gold": "text 1", "prompt": f"question {i}"} for i in range(N)]
    return store, stored(store, VALUES, items=asked, answers=answers, metric="em")


def changes(store: ScoreStore, scores: list[Scores], first: str, second: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for item in paired_answers(store, scores, first, second):
        found.setdefault(item.change, []).append((item.task, item.id))
    return found


def test_items_are_won_lost_or_the_same(world: tuple[ScoreStore, list[Scores]]) -> None:
    found = changes(*world, "base", "ties")
    assert found["won"] == [*(("one", f"one-{i}") for i in range(4, 8)), ("two", "two-11")]
    assert found["lost"] == [("one", "one-0")]
    assert len(found["same"]) == 2 * N - 6
    turned = changes(*world, "ties", "base")
    assert (turned["won"], turned["lost"]) == (found["lost"], found["won"])


def test_items_may_lack_choices_and_gold(tmp_path: Path) -> None:
    """Stored items of another writer may leave out what a task does not have; nothing of them is needed here."""
    store = ScoreStore(tmp_path / "scores")
    scores = stored(store, VALUES, items=[{"prompt": f"question {i}"} for i in range(N)], answers=answers, metric="em")
    path = next(store.root.glob("*/items.jsonl.gz"))
    bare = [
        {k: v for k, v in json.loads(line).items() if k not in ("choices", "gold")}
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    text = "".join(json.dumps(item) + "\n" for item in bare).encode()
    path.write_bytes(gzip.compress(text))
    signed = [s.model_copy(update={"items": bytes_digest(text)}) for s in scores]
    assert {item.choices for item in paired_answers(store, signed, "base", "ties")} == {None}
    document = compare(store, signed, baseline="base").to_dict()
    assert {item["gold"] for item in document["side_by_side"]["items"]} == {None}
    assert any(flip["choices"] is None for flips in document["flips"].values() for flip in flips)


def test_lower_metrics_are_won_by_the_lower_score(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    values = {BASE: {"one": [0.2, 0.5, 0.5]}, TIES: {"one": [0.5, 0.2, 0.5]}}
    scores = stored(store, values, metric="ter", lower=["ter"], clusters=3)
    assert [item.change for item in paired_answers(store, scores, "base", "ties")] == ["lost", "won", "same"]


@pytest.mark.parametrize(("metric", "index"), [("acc", 0), ("acc_norm", 1), ("acc_bytes", 1)])
def test_the_choice_is_that_of_the_metric(metric: str, index: int) -> None:
    row, item = {"loglikelihoods": [-2.0, -3.0]}, {"choices": ["a", "long choice"]}
    assert picked(row, item, metric) == index
    assert picked({"loglikelihoods": None}, item, metric) is None
    assert picked(row, {"choices": None}, metric) is None


def test_the_document_has_what_differs_between_any_two(world: tuple[ScoreStore, list[Scores]]) -> None:
    store, scores = world
    found = compare(store, scores).to_dict()["side_by_side"]
    assert list(found["answers"]) == ["base", "my-average", "ties"]  # equal weights have one entry; the base is its own
    assert {(i["task"], i["id"]) for i in found["items"]} == {
        *(("one", f"one-{i}") for i in (0, 4, 5, 6, 7, 9)),
        ("two", "two-11"),
    }
    assert found["items"][-1]["id"] == "one-9"  # items whose texts alone differ come last
    assert found["items"][1]["task"] == "two"  # tasks take turns
    assert (found["differing"], found["left_out"]) == (7, 0)
    at = [i["id"] for i in found["items"]].index("one-9")
    assert found["answers"]["ties"][at] == [0.0, "another 0", None]
    assert found["answers"]["base"][at] == [0.0, "text 0", None]


def test_the_document_is_bounded(world: tuple[ScoreStore, list[Scores]]) -> None:
    store, scores = world
    tables = tables_of(store, scores, suites_of(store, scores, {}))
    whole = side_by_side(tables, [BASE, TIES]).to_dict()
    size = len(json.dumps([whole["items"], list(whole["answers"].values())]))
    part = side_by_side(tables, [BASE, TIES], size // 2).to_dict()
    assert 0 < len(part["items"]) < len(whole["items"])
    assert part["items"] == whole["items"][: len(part["items"])]
    assert part["left_out"] == len(whole["items"]) - len(part["items"])
    assert len(json.dumps([part["items"], list(part["answers"].values())])) <= size // 2 + 100
    assert {len(line) for line in part["answers"].values()} == {len(part["items"])}


@pytest.fixture
def command(world: tuple[ScoreStore, list[Scores]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    store, scores = world

    def run(*arguments: str, code: int = 0) -> Result:
        names = [a for a in arguments if a in ("base", "ties", "average")]
        chosen = sorted(scores, key=lambda s: [*names, s.configuration.name].index(s.configuration.name))
        asked = [s for s in chosen if s.configuration.name in names] or scores
        monkeypatch.setattr("workbench.api.results.imported_scores", lambda *_: (asked, store, tmp_path))
        result = CliRunner().invoke(app, ["scores", "items", *arguments], catch_exceptions=code == 2)
        assert result.exit_code == code or code == 2, result.output
        return result

    return run


def test_the_command_prints_changed_items(command: Any) -> None:
    text = command("base", "ties").stdout
    assert text.startswith("ties beside base\n24 items: 5 won, 1 lost, 18 with the same score\n")
    assert text.count("\nwon  ") == 5
    assert text.count("\nlost  ") == 1
    assert text.count("\nsame score  ") == 1  # another text
    block = text.partition("lost  ")[2].partition("\n\n")[0].splitlines()
    assert [line.split(None, 1) for line in block[1:]] == [
        ["prompt", "question 0"],
        ["right", "answer  text 1"],
        ["base", "[1] text 1"],
        ["ties", "[0] text 0"],
    ]


def test_options_choose_items(command: Any) -> None:
    assert "two-11" not in command("base", "ties", "--task", "one").stdout
    assert command("base", "ties", "--only", "lost").stdout.count("question") == 1
    assert command("base", "ties", "--only", "all", "--first", "3").stdout.count("question") == 3
    assert "21 more items: --first 24" in command("base", "ties", "--only", "all", "--first", "3").stderr
    assert command("base", "ties", "--text", "ANOTHER").stdout.count("question") == 1
    assert "no such item" in command("base", "ties", "--text", "nowhere").stderr


def test_the_document_of_the_command(command: Any) -> None:
    found = json.loads(command("base", "ties", "--only", "won", "--json").stdout)
    assert {key: found[key] for key in ("first", "second", "items", "won", "lost", "same")} == {
        **{"first": "base", "second": "ties", "items": 24},
        **{"won": 5, "lost": 1, "same": 18},
    }
    assert [item["id"] for item in found["shown"]] == ["one-4", "one-5", "one-6", "one-7", "two-11"]
    assert found["shown"][0]["second"] == {"score": 1.0, "response": "text 1", "picked": None, "loglikelihoods": None}


def test_bad_input_is_refused(command: Any) -> None:
    wrong = command("base", "ties", "--task", "onne", code=2).exception
    assert wrong.message == "--task onne: no items of this task were scored"
    assert "one" in wrong.hint
    assert command("base", "base", code=2).exception.message == "base is named twice"
    assert "expected one or two" in command("base", "ties", "average", code=2).exception.message


@pytest.mark.parametrize("options", [{"only": "all"}, {"task": "one"}, {"only": "won"}, {"text": "ANOTHER"}])
def test_items_from_python_are_those_of_the_command(command: Any, options: dict[str, Any]) -> None:
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    printed = json.loads(command("base", "ties", *flags, "--json").stdout)
    found = api.items(["base", "ties"], **options)
    assert {**found.document.to_dict(), "warnings": []} == printed
    assert (found.first, found.second, found.counts["won"]) == ("base", "ties", printed["won"])
    shown, frame = printed["shown"], found.to_pandas()
    assert list(frame.id) == [item["id"] for item in shown]
    for side in ("first", "second"):
        assert list(frame[f"{side}_score"]) == [item[side]["score"] for item in shown]
        assert list(frame[f"{side}_answer"]) == [item[side]["response"] for item in shown]
    page = found._repr_html_()
    assert page.count("<tr>") == 1 + min(len(shown), 20)
    assert ("more items are in" in page) == (len(shown) > 20)

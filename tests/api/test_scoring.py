"""Scoring, comparing and searching from Python give what the commands print and write."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call, document
from worlds.project import Project
from worlds.search_world import RECIPE, lay_out, searched

from workbench import api
from workbench.ground.errors import UsageError, WorkbenchError

AVERAGE = RECIPE.replace("merge: ties, density: 0.5, lambda: 1.0", "merge: average")
HALF = RECIPE.replace("lambda: 1.0", "lambda: 0.5")


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the recipes mine, half and plain, and a suite of two tasks."""
    found = lay_out(project)
    for name, text in (("mine", RECIPE), ("half", HALF), ("plain", AVERAGE)):
        found.write(text, f"{name}.yaml")
    monkeypatch.chdir(found.path)
    return found.path


def without_seconds(text: str) -> Any:
    """A comparison document without times and the command."""
    found = json.loads(text)
    for one in found["configurations"]:
        one.pop("seconds")
        for key in ("seconds", "tokens_per_second", "peak_bytes"):
            del one["costs"][key]
    for key in ("command", "created"):
        found["provenance"].pop(key)
    return found


def test_scores_and_rows_are_those_of_the_commands(world: Path) -> None:
    scored = api.evaluate(["mine", "half", "plain"], device="cpu")
    told = document("compare", "mine", "half", "plain")
    assert [row.to_dict() for row in scored.rows] == told["rows"]
    assert scored.recommendation
    assert scored.recommendation.to_dict() == told["recommendation"]
    assert scored.baseline == told["baseline"] == "base"
    assert [one["name"] for one in scored.document["configurations"]] == ["base", "one", "two", "mine", "half", "plain"]
    (printed,) = (document("eval", "mine", "half", "plain", "--device", "cpu"),)
    frame = scored.to_pandas("scores").set_index(["configuration", "task", "metric"])
    for one in printed["configurations"]:
        for task, metrics in one["tasks"].items():
            for metric, value in metrics.items():
                if metric != "n":
                    row = frame.loc[one["name"], task, metric]
                    assert (row.value, row.low, row.high, row.n) == (value["value"], value["low"], value["high"], metrics["n"])
    again = api.compare(["mine", "half", "plain"])
    assert again.rows == scored.rows
    assert len(again.to_pandas()) == len(told["rows"])
    assert set(again.to_pandas("configurations").name) == {"base", "one", "two", "mine", "half", "plain"}


def test_two_configurations_are_a_pair(world: Path) -> None:
    scored = api.evaluate(("mine", "half"), device="cpu")
    told = document("compare", "mine", "half")
    assert scored.pair == ("mine", "half")
    assert scored.baseline == told["baseline"] == "mine"
    assert [row.to_dict() for row in scored.rows] == told["rows"]
    assert {row.configuration for row in scored.rows} == {"half"}
    against = api.compare(["mine", "half"], baseline="base").rows
    assert [row.to_dict() for row in against] == document("compare", "mine", "half", "--baseline", "base")["rows"]


def test_the_page_is_that_of_the_report(world: Path) -> None:
    scored = api.evaluate(["mine", "half"], device="cpu")
    saved = scored.save(world / "there" / "mine.html")
    call("report", "mine", "half", "-o", "here/mine.html")
    assert [path.name for path in saved] == ["mine.html", "mine.md", "mine.json"]
    assert without_seconds(saved[2].read_text()) == without_seconds((world / "here" / "mine.json").read_text())
    frame = scored._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == saved[0].read_text()  # type: ignore[index]
    assert 'sandbox="allow-scripts"' in frame
    assert repr(scored) == "<6 configurations against mine: base, one, two, average, mine, half>"


def test_options_are_those_of_the_commands(world: Path) -> None:
    scored = api.evaluate(
        "mine", suite="words", device="cpu", settings="mix.lambda=0.25", limit=8, controls=False, runs="elsewhere"
    )
    told = document(
        "eval", "mine", "--set", "mix.lambda=0.25", "--limit", "8", "--no-controls", "--runs-dir", "elsewhere", "--device", "cpu"
    )
    (one,) = told["configurations"]
    (configuration,) = scored.document["configurations"]
    assert configuration["digest"] == one["digest"]
    assert {row["n"] for row in scored.tables()["scores"]} == {8}
    assert scored.rows == [], "one configuration is compared with nothing"
    points = api.evaluate("mine", device="cpu", sweep="mix.lambda=0.25,1", controls=False, baseline=None)
    assert [c["name"] for c in points.document["configurations"]] == ["mine[lambda=0.25]", "mine[lambda=1]"]
    assert points.document["sweeps"], "the points are one sweep"


def test_a_model_alone(world: Path) -> None:
    scored = api.evaluate("base", suite=["words"], device="cpu")
    assert len(scored.document["configurations"]) == 1
    assert list(scored.to_pandas("scores").metric) == ["margin", "acc", "exact_match"]
    assert scored.rows == []
    assert "<iframe" in scored._repr_html_()


def test_what_is_not_scored_is_left_out_with_a_warning(world: Path) -> None:
    with pytest.raises(WorkbenchError, match="not scored yet on words: base, mine") as error:
        api.compare("mine")
    assert error.value.hint == "workbench eval mine"
    api.evaluate("mine", device="cpu")
    with pytest.warns(UserWarning, match=r"left out: half \(not scored yet on words\)") as warned:
        found = api.compare(["mine", "half"])
    assert warned[0].filename == __file__, "the warning names the line that asked"
    assert [one.name for one in found.left_out] == ["half"]
    assert found.pair is None


@pytest.mark.part("search")
def test_a_search_is_that_of_the_command(world: Path) -> None:
    text = searched("{mix.lambda: [0.2, 1.6]}", ", trials: 3, sampler: random, controls: false")
    Project(world).write(text, "found.yaml")
    found = api.search("found", device="cpu")
    told = document("search", "found", "--device", "cpu")
    assert found.document["trials"] == told["trials"]
    assert found.winner == told["winner"]
    trials = found.to_pandas()
    assert list(trials["mix.lambda"]) == [trial["values"]["mix.lambda"] for trial in told["trials"]]
    assert all(path.is_file() for path in found.recipes.values())
    assert found.save(world / "search.html")[0].read_text() == html.unescape(
        re.search(r'srcdoc="([^"]*)"', found._repr_html_())[1]  # type: ignore[index]
    )


@pytest.mark.parametrize(
    ("call_it", "message"),
    [
        (lambda: api.evaluate("mine", limits=3), "unknown option 'limits'"),  # type: ignore[call-arg]
        (lambda: api.evaluate("mien"), "'mien': expected a recipe, a model directory or a hub id"),
        (lambda: api.evaluate("mine", baseline="bse", device="cpu"), "baseline 'bse': not one of the scored configurations"),
        pytest.param(
            lambda: api.search("mine", sweep="mix.lambda=1,2"), "search has no option 'sweep'", marks=pytest.mark.part("search")
        ),
        (lambda: api.evaluate("mine", suite="wrods", device="cpu"), "wrods"),
    ],
)
def test_bad_arguments(world: Path, call_it: Any, message: str) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(message)):
        call_it()


def test_tables_have_names(world: Path) -> None:
    scored = api.evaluate("base", suite="words", device="cpu")
    with pytest.raises(UsageError, match=r"to_pandas\('row'\): no such table") as error:
        scored.to_pandas("row")
    assert error.value.hint == "Tables: rows, scores, configurations."


def test_items_refuse_what_they_do_not_have(world: Path) -> None:
    with pytest.raises(UsageError, match="only 'chnged': no such kind"):
        api.items(["mine", "half"], only="chnged")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="items has no option 'sweep'"):
        api.items(["mine", "half"], sweep="mix.lambda=1,2")
    with pytest.raises(UsageError, match="is named twice"):
        api.items(["mine", "mine"])
    with pytest.raises(WorkbenchError, match="not scored yet"):
        api.items(["mine", "half"])


def test_texts_of_models_are_escaped_in_notebooks() -> None:
    from workbench.api.answers import ItemsBeside
    from workbench.compare.answers import Item

    answer = {"score": 1.0, "response": "<script>alert(1)</script>", "picked": None, "loglikelihoods": None}
    item = {"task": "t", "id": "1", "cluster": None, "metric": "em", "change": "same", "prompt": "<b>" + "x" * 700}
    item |= {"choices": None, "gold": "<i>", "first": answer, "second": answer}
    page = ItemsBeside("<a>", "b", {"items": 1, "won": 0, "lost": 0, "same": 1}, [Item.model_validate(item)])._repr_html_()
    assert not any(tag in page for tag in ("<script", "<b>", "<i>", "<a>"))
    assert "… (103 more characters)" in page

"""How searches end on a tiny model: with a winner that is a control, with a control that no candidate beats, without any score."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from worlds.commands import call, document
from worlds.jsonl import read_jsonl, write_jsonl
from worlds.project import Project
from worlds.search_world import RECIPE, SPACE, folder_of, lay_out, search_of, searched

from workbench.ground.errors import WorkbenchError
from workbench.search import winner
from workbench.search.objective import Answers, Rival
from workbench.search.winner import conclude


def test_what_the_test_cannot_tell_is_said_first(project: Project, cwd: Path) -> None:
    """Ten clusters make two halves of five, and below eight no verdict is given."""
    world = lay_out(project, clusters=10)
    world.write(searched(SPACE, ", trials: 3, sampler: random, controls: false"))
    called = call("search", "recipes/test.yaml")
    warning = "task 'pick' has 5 of its 10 clusters in the test half, but a verdict needs 8: the verdict on 'words' is always"
    assert warning in called.stderr
    assert called.stderr.index(warning) < called.stderr.index("control 1/1")
    found = json.loads((folder_of(world) / "search.json").read_text())
    assert [text.startswith(warning) for text in found["warnings"]] == [True]
    ((line,),) = found["test"]["against"].values()
    assert line["verdict"] == "no item changed" or line["reason"] == "too few clusters: 5, at least 8 needed"


def test_one_item_is_too_few(project: Project) -> None:
    world = lay_out(project, items=1)
    with pytest.raises(
        WorkbenchError,
        match=r"search.objective: task 'pick' has 1 item, but a search needs at least one search item and one test item",
    ):
        search_of(world)


def test_a_winner_that_is_a_control(world: Project) -> None:
    """The only candidate is the recipe as it stands, whose weights are those of the base."""
    world.write(
        searched(SPACE.replace("0.2", "0.0"), ", trials: 1, sampler: random", RECIPE.replace("lambda: 1.0", "lambda: 0.0"))
    )
    called = call("search", "recipes/test.yaml")
    assert "trial-0 has the same weights as the control base" in called.stdout
    found = json.loads((folder_of(world) / "search.json").read_text())
    rows = {row["name"]: row for row in found["test"]["rows"]}
    assert found["winner"] == "trial-0"
    assert rows["trial-0"]["same_as"] == "base"
    assert rows["trial-0"]["digest"] == rows["base"]["digest"]
    assert {row["same_as"] for name, row in rows.items() if name != "trial-0"} == {None}
    ((line,),) = found["test"]["against"].values()
    assert (line["verdict"] == "no item changed") == (line["test"]["diff"] == 0 and line["test"]["p"] == 1)


BAD = RECIPE.replace("lambda: 1.0", "lambda: 3.5e+4")


def test_no_candidate_beats_a_control(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate falls behind the best control and is given up: a finding, with document and page, and no winner."""
    monkeypatch.setattr("workbench.search.run.beaten_by", lambda answers, known, *rest, **options: known[0])
    world.write(searched(SPACE, ", trials: 4, sampler: random, random: 1"))
    called = call("search", "recipes/test.yaml", "-o", "best.yaml")
    found = json.loads((folder_of(world) / "search.json").read_text())
    controls = {row["digest"] for row in found["test"]["rows"] if row["part"] == "control"}
    assert {t["digest"] in controls for t in found["trials"]} == {True, False}
    assert all(t["stopped"] is (t["digest"] not in controls) for t in found["trials"]), "equal weights have the control's scores"
    assert len(found["trials"]) == 5
    assert (found["winner"], found["recipes"], found["test"]["against"]) == (None, {}, {})
    (best,) = found["unbeaten"]
    control = max(found["controls"], key=lambda c: c["scores"][0])
    assert (best["name"], best["role"], best["search"]) == (control["name"], control["role"], control["scores"])
    assert best["test"] == next(r["test"] for r in found["test"]["rows"] if r["name"] == best["name"])
    assert {c["name"]: c["role"] for c in found["controls"]}["one"] == "brick"
    assert (
        f"{best['name']} (words: search {best['search'][0]:.3f}, test {best['test'][0]:.3f}): each scores less" in called.stdout
    )
    assert "no candidate beats " in called.stdout
    assert "best.yaml was not written: there is no winner" in called.stderr
    assert not (world.path / "best.yaml").exists()
    call("report", "test")
    assert f"{best['name']}, which scores" in (world.path / "reports" / "report-search.html").read_text("utf-8")
    again = document("search", "recipes/test.yaml")
    assert again["unbeaten"] == found["unbeaten"]


def test_a_candidate_that_harms_a_guarded_task_does_not_win(world: Project) -> None:
    """The base answers every item of the guarded task `keep` right, since its answers are the gold ones: every merge loses."""
    tasks = world.path / "evals" / "tasks"
    rows = read_jsonl(tasks / "data" / "pick.jsonl")
    (tasks / "keep.yaml").write_text(
        (tasks / "pick.yaml").read_text().replace("task: pick", "task: keep").replace("pick.jsonl", "keep.jsonl")
    )
    write_jsonl(tasks / "data" / "keep.jsonl", rows)
    suite = world.path / "evals" / "suites" / "words.yaml"
    suite.write_text("suite: words\ntasks: [pick, keep]\nchance: {pick: 0.25}\nroles: {keep: guarded}\ntolerance: {keep: 0.02}\n")
    world.write(RECIPE)
    call("eval", "recipes/test.yaml")
    shown = document("scores", "items", "recipes/test.yaml", "--task", "keep", "--only", "all")["shown"]
    gold = {item["id"]: item["first"]["picked"] for item in shown}
    write_jsonl(tasks / "data" / "keep.jsonl", [{**row, "gold": gold[row["id"]]} for row in rows])
    world.write(searched(SPACE, ", trials: 4, sampler: random", RECIPE))
    called = call("search", "recipes/test.yaml")
    found = json.loads((folder_of(world) / "search.json").read_text())
    complete = [t for t in found["trials"] if not t["stopped"]]
    assert complete
    for trial in complete:
        (loss,) = trial["guarded"]
        assert loss["harmful"] is (loss["loss"] > loss["tolerance"] == 0.02)
    harmless = {t["name"]: t["scores"][0] for t in complete if not t["guarded"][0]["harmful"]}
    assert found["winner"] == (max(harmless, key=lambda name: harmless[name]) if harmless else None)
    harmful = [t["name"] for t in complete if t["guarded"][0]["harmful"]]
    assert harmful
    (said,) = (text for text in found["guarded"] if text.startswith("Lose more than the tolerance on a guarded task"))
    assert all(name in said for name in harmful)
    assert said in called.stdout


def test_nothing_scored_is_an_error(world: Project) -> None:
    """No candidate has a score: all failed, or none was begun."""
    failing = searched("{mix.lambda: {choices: [8.0e+29, 9.0e+29]}}", ", trials: 2, sampler: random, controls: false", BAD)
    world.write(failing)
    with pytest.raises(WorkbenchError, match="all 2 candidates failed; trial-0: "):
        call("search", "recipes/test.yaml")
    search = search_of(world, rest=", trials: 2, controls: false", name="other.yaml")
    with pytest.raises(WorkbenchError, match="no candidate was scored before the search ended"):
        conclude(search)


def test_a_candidate_below_a_control_is_no_winner(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate is scored on all items, and all score less than a control: the control is named, and no recipe is written."""
    monkeypatch.setattr("workbench.search.run.beaten_by", lambda *_, **__: None)
    world.write(searched(SPACE, ", trials: 3, sampler: random", BAD))
    call("search", "recipes/test.yaml")
    found = json.loads((folder_of(world) / "search.json").read_text())
    top = max(control["scores"][0] for control in found["controls"])
    scored = {t["name"]: t["scores"][0] for t in found["trials"]}
    assert not any(t["stopped"] for t in found["trials"])
    if max(scored.values()) < top:
        assert (found["winner"], found["recipes"]) == (None, {})
        assert found["unbeaten"][0]["search"][0] == top
    else:
        assert scored[found["winner"]] >= top


def test_a_harmful_control_forbids_no_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be shipped itself, so that a candidate below it may win."""
    answers = Answers({}, {})
    rivals = {name: Rival(name, answers, (score,)) for name, score in {"harmful": 0.9, "base": 0.4, "trial-0": 0.6}.items()}
    done = [SimpleNamespace(scores=[0.6], stopped=False, harmful=False)]
    study: Any = SimpleNamespace(finished=lambda *_: done)
    monkeypatch.setattr(winner, "finished", lambda *arms: [rivals["trial-0"]] if arms[-1] == "search" else [])
    for harmful, best in ({"harmful"}, ["trial-0"]), (set(), []):
        search: Any = SimpleNamespace(controls=[rivals["harmful"], rivals["base"]], harmful=harmful)
        assert [rival.name for rival, _ in winner._best(search, study)] == best

"""`search --log`: each control and candidate is a run of the tracker."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from worlds.commands import call
from worlds.project import Project
from worlds.search_document import make_search
from worlds.search_world import SPACE, folder_of, searched

from workbench.search.logged import runs_of_search
from workbench.search.result import SearchResult
from workbench.trackers import runs as trackers
from workbench.trackers.runs import LoggedRun


def test_each_control_and_candidate_is_a_run(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[LoggedRun] = []
    tracker = SimpleNamespace(place="a list", log=kept.append)
    monkeypatch.setattr(trackers, "open_tracker", lambda tool, project: tracker)
    world.write(searched(SPACE, ", trials: 4, sampler: random, random: 1"))
    call("search", "recipes/test.yaml", "--log", "wandb")
    found = json.loads((folder_of(world) / "search.json").read_text())
    assert [run.name for run in kept] == [one["name"] for one in (*found["controls"], *found["trials"])]
    tested = {row["name"]: row["test"][0] for row in found["test"]["rows"]}
    for run, one in zip(kept, (*found["controls"], *found["trials"]), strict=True):
        assert run.params == one.get("values", {})
        assert run.metrics["estimate/words" if one.get("stopped") else "search/words"] == one["scores"][0]
        assert run.metrics.get("test/words") == tested.get(run.name)
        assert run.metrics["winner"] == float(run.name == found["winner"])
        assert run.tags["role"] == one.get("role", one.get("arm"))
    assert tested


def test_scores_of_candidates_that_were_stopped_early_are_estimates() -> None:
    found = make_search(12, random=3, objectives=2)
    runs = {run.name: run for run in runs_of_search(SearchResult.of(found, "search.json"))}
    names = [objective["name"] for objective in found["objectives"]]
    stopped = [trial for trial in found["trials"] if trial.get("stopped")]
    failed = [trial for trial in found["trials"] if trial.get("error")]
    assert stopped
    assert failed
    for trial in stopped:
        scores = {f"estimate/{name}": score for name, score in zip(names, trial["scores"], strict=True)}
        assert {name: value for name, value in runs[trial["name"]].metrics.items() if "/" in name} == {
            **scores,
            "cost/seconds": trial["seconds"]["all"],
        }
    for trial in failed:
        assert runs[trial["name"]].tags["error"] == trial["error"]
        assert runs[trial["name"]].metrics["winner"] == 0.0
    assert [run.name for run in runs.values() if run.metrics["winner"]] == found["front"]
    for row in found["test"]["rows"]:
        assert [runs[row["name"]].metrics[f"test/{name}"] for name in names] == row["test"]

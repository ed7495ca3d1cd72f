"""Processes that share a search: each of them waits for the candidates of the others, and the newest result stays."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from worlds.project import Project
from worlds.search_world import searched

from workbench.recipe.recipe import load_recipe
from workbench.search.clock import Clock, until_all_end
from workbench.search.run import Scoring, Search, attempted, candidate, open_study, prepare, run
from workbench.search.study import Study, Trial
from workbench.search.winner import RESULT, conclude

WAITING = "waiting for a candidate of other processes"


def search_in(world: Project, trials: int) -> Search:
    text = searched("{mix.lambda: [0.2, 1.6]}", f", trials: {trials}, sampler: random, controls: false, random: 0")
    return prepare(load_recipe(world.write(text)), world.path / "runs", Scoring("cpu"))


def claimed_elsewhere(search: Search) -> tuple[Study, Trial]:
    """The study of another process, and its candidate."""
    other = open_study(search)
    trial = other.claim("search", search.trials)
    assert trial is not None
    return other, trial


def run_and(search: Search, then: Callable[[], None]) -> list[str]:
    """Run a search, and do something when it waits for other processes; return the texts of its events."""
    texts: list[str] = []

    def hear(event: Mapping[str, Any]) -> None:
        texts.append(str(event["text"]))
        if event["text"] == WAITING:
            then()

    run(replace(search, events=hear))
    return texts


def test_a_search_waits_for_the_candidate_of_another_process(world: Project) -> None:
    search = search_in(world, 3)
    other, trial = claimed_elsewhere(search)

    def finish() -> None:
        attempt = attempted(search, candidate(search, trial.name, trial.values), [])
        other.finish(trial, attempt.scores, attempt.result)

    assert WAITING in run_and(search, finish)
    other.close()
    assert [t.number for t in other.finished("search")] == [0, 1, 2]


def test_a_candidate_whose_process_dies_is_taken_over(world: Project) -> None:
    search = search_in(world, 3)
    other, trial = claimed_elsewhere(search)
    assert WAITING in run_and(search, other.close)
    found = other.finished("search")
    assert [t.number for t in found] == [0, 1, 2]
    assert found[0].values == trial.values
    assert found[0].scores


def test_nothing_is_waited_for_after_the_time_is_used_up(world: Project, tmp_path: Path) -> None:
    """A candidate that a dead process left needs time that is not there; the next call scores it."""
    search = search_in(world, 3)
    other, _ = claimed_elsewhere(search)
    other.close()
    study, calls = open_study(search), list[int]()
    with Clock(tmp_path, 0.0) as clock:
        until_all_end(study, clock, lambda event: None, lambda: calls.append(1))
    study.close()
    assert calls == [1]
    assert study.finished() == []


def test_an_older_result_does_not_replace_a_newer_one(world: Project) -> None:
    """Results are written one after the other, and each one reads the study when its turn comes."""
    search = search_in(world, 1)
    run(search)
    with FileLock(search.folder / "result.lock"):
        early = threading.Thread(target=conclude, args=(search,), daemon=True)
        early.start()
        early.join(0.5)
        assert early.is_alive()
        run(replace(search, trials=2, controls=[]))
    early.join()
    assert [t["number"] for t in json.loads((search.folder / RESULT).read_text())["trials"]] == [0, 1]

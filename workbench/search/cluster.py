"""Search on a Ray cluster: each worker loads base and bricks once and scores one candidate at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.evaluate.cluster import LOSSES, Pool, cluster
from workbench.evaluate.lineup import LineupEntry
from workbench.recipe.recipe import from_data, load_recipe
from workbench.resolve.resolve import resolve
from workbench.search.clock import Clock
from workbench.search.race import Rival
from workbench.search.run import (
    Attempt,
    Scoring,
    Search,
    add_control,
    arms,
    attempted,
    begin,
    candidate,
    controls,
    keep,
    mixture,
    open_study,
    prepare,
    rivals,
)
from workbench.search.space import plain_data
from workbench.search.study import Study, Trial
from workbench.search.together import until_all_end
from workbench.trust import is_trusted


@dataclass(frozen=True)
class Options:
    """Arguments with which a worker prepares the same search. The project must have the same path on all nodes.

    Attributes:
        recipe: File of the recipe.
        settings: Settings from `--set`.
        runs: Folder of the runs.
        scoring: How candidates are scored.
    """

    recipe: Path
    settings: tuple[str, ...]
    runs: Path
    scoring: Scoring


class Worker:
    """One process of the cluster, with the base in memory."""

    def __init__(self, options: Options) -> None:
        recipe = load_recipe(options.recipe, options.settings)
        self.search = prepare(recipe, options.runs, options.scoring)

    def score(self, name: str, role: str, data: dict[str, Any], known: Sequence[Rival]) -> Attempt:
        """Score a configuration given as plain data; without rivals it is scored on all search items."""
        recipe = from_data(data, self.search.recipe.project)
        return attempted(self.search, LineupEntry(name, role, resolve(recipe)), known)


def run_on_cluster(search: Search, options: Options, workers: int | None = None) -> None:
    """Score controls and candidates on a Ray cluster: the one of RAY_ADDRESS, or a new one on this machine.

    A lost worker is replaced, and its candidate is scored again under the same number.

    Args:
        search: The search.
        options: Arguments for the workers.
        workers: Number of workers; default: one per GPU of the cluster, or one per two CPUs.

    Raises:
        WorkbenchError: If ray is not installed, the cluster has too few resources, or a worker fails.
    """
    with cluster() as ray:
        pool = Pool(ray, Worker, (options,), workers, is_trusted(search.recipe.project))
        study = open_study(search)
        try:
            with Clock(search.folder, search.budget) as clock:
                _score_controls(search, pool)
                begin(search, study, clock)
                until_all_end(study, clock, search.events, partial(_score_arms, search, study, clock, pool))
        finally:
            study.close()


def _submit(pool: Pool, entry: LineupEntry, known: Sequence[Rival], ticket: Any) -> None:
    """Give a configuration to an idle worker; `pool.next` returns `ticket` with its attempt."""
    data = plain_data(entry.resolved.recipe)
    data.pop("search", None)
    pool.submit(ticket, entry.name, entry.role, data, list(known))


def _score_controls(search: Search, pool: Pool) -> None:
    """Score the controls on all workers and add them in their order."""
    entries = controls(search)
    answers_of = _score_all(search, pool, entries)
    for entry in entries:
        add_control(search, entry, answers_of[entry.name])
    if mixed := mixture(search):
        add_control(search, mixed, _score_all(search, pool, [mixed])[mixed.name])


def _score_all(search: Search, pool: Pool, entries: Sequence[LineupEntry]) -> dict[str, Any]:
    """Score configurations on all workers; return their answers by name."""
    queue, lost, answers = list(entries), 0, {}
    while queue or pool.busy:
        while queue and pool.idle:
            _submit(pool, queue[0], [], queue.pop(0))
        entry, attempt, was_lost = pool.next()
        if was_lost:
            search.events({"stage": "search", "text": f"{entry.name}: its worker was lost, scoring again"})
            queue.append(entry)
            lost += 1
        elif attempt.scores is None:
            raise WorkbenchError(f"control {entry.name}: {attempt.result['error']}")
        else:
            answers[entry.name] = attempt.answers
            search.events({"stage": "search", "text": f"control {len(answers)}/{len(entries)}: {entry.name}"})
        if lost > LOSSES * len(entries):
            raise WorkbenchError(
                f"{lost} workers of the cluster were lost while scoring the controls",
                "Check the cluster's memory with `ray status`.",
            )
    return answers


def _score_arms(search: Search, study: Study, clock: Clock, pool: Pool) -> None:
    """Score candidates until none is left to start or the time is used up."""
    for arm, most in arms(search):
        _score_arm(search, study, clock, pool, arm, most)


def _score_arm(search: Search, study: Study, clock: Clock, pool: Pool, arm: Any, most: int | None) -> None:
    """Score the candidates of one arm, one per worker at a time."""
    losses: dict[str, int] = {}
    lost_trials: list[Trial] = []
    started: dict[str, float] = {}
    ended = False

    def next_trial() -> Trial | None:
        if lost_trials:
            return lost_trials.pop()
        return None if ended or clock.over() else study.claim(arm, most)

    while True:
        while pool.idle and (trial := next_trial()) is not None:
            started.setdefault(trial.name, time.perf_counter())
            _submit(pool, candidate(search, trial.name, trial.values), rivals(search, study), trial)
        ended = ended or pool.idle
        if not pool.busy:
            return
        trial, attempt, was_lost = pool.next()
        if was_lost:
            losses[trial.name] = losses.get(trial.name, 0) + 1
            search.events({"stage": "search", "text": f"{trial.name}: its worker was lost, scoring again"})
            if losses[trial.name] < LOSSES:
                lost_trials.append(trial)
                continue
            attempt = Attempt(None, {"error": f"{LOSSES} workers were lost while scoring it", "stopped": False, "seconds": {}})
        keep(search, study, clock, trial, attempt, time.perf_counter() - started[trial.name])

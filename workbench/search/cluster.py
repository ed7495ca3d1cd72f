"""Search on a Ray cluster: each worker loads base and bricks once and scores one candidate at a time. Only this file imports ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.evaluate.lineup import LineupEntry
from workbench.lazy import torch
from workbench.recipe.recipe import from_data, load_recipe
from workbench.recipe.trust import VARIABLE
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

LOSSES = 3
"""Number of workers that may be lost while scoring one candidate before the candidate counts as failed."""


@dataclass(frozen=True)
class Options:
    """Arguments with which a worker prepares the same search. The project must have the same path on all nodes.

    Attributes:
        recipe: File of the recipe.
        settings: Settings from `--set`.
        runs: Folder of the runs.
        scoring: How candidates are scored.
        trusted: Whether the project's method files may be loaded, as on the machine that the search was started on.
    """

    recipe: Path
    settings: tuple[str, ...]
    runs: Path
    scoring: Scoring
    trusted: bool = False


class Worker:
    """One process of the cluster, with the base in memory."""

    def __init__(self, options: Options, threads: int) -> None:
        torch.set_num_threads(threads)
        if options.trusted:
            os.environ[VARIABLE] = "1"
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
    with _cluster() as ray:
        pool = _Pool(ray, options, workers)
        study = open_study(search)
        try:
            with Clock(search.folder, search.budget) as clock:
                _score_controls(search, pool)
                clock.begin()
                for arm, most in arms(search):
                    _score_arm(search, study, clock, pool, arm, most)
        finally:
            study.close()


@contextmanager
def _cluster() -> Iterator[Any]:
    """Yield ray, connected to a cluster; disconnect afterwards if this call connected it."""
    try:
        import ray
    except ImportError:
        raise WorkbenchError("--engine ray: ray is not installed", "pip install 'brick-workbench[cluster]'") from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level=40, include_dashboard=False)
    try:
        yield ray
    finally:
        if started_here:
            ray.shutdown()


class _Pool:
    """The idle workers, and the busy workers with their tasks."""

    def __init__(self, ray: Any, options: Options, count: int | None) -> None:
        self._ray, self._options = ray, options
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        count = count or gpus or max(1, cpus // 2)
        self._threads = 1 if gpus else max(1, cpus // count)
        if count > max(gpus, cpus):
            raise WorkbenchError(
                f"--workers {count}: the cluster has {cpus} CPUs and {gpus} GPUs", f"--workers {max(gpus, cpus, 1)}"
            )
        self._needs = {"num_gpus": 1} if gpus else {"num_cpus": self._threads}
        self._idle = [self._new() for _ in range(count)]
        self._busy: dict[Any, tuple[Any, Any]] = {}

    def _new(self) -> Any:
        return self._ray.remote(Worker).options(**self._needs).remote(self._options, self._threads)

    @property
    def idle(self) -> bool:
        """True if a worker is idle."""
        return bool(self._idle)

    @property
    def busy(self) -> bool:
        """True if a worker is busy."""
        return bool(self._busy)

    def submit(self, entry: LineupEntry, known: Sequence[Rival], ticket: Any) -> None:
        """Give a configuration to an idle worker; `next` returns `ticket` with the result."""
        worker = self._idle.pop()
        data = plain_data(entry.resolved.recipe)
        data.pop("search", None)
        self._busy[worker.score.remote(entry.name, entry.role, data, list(known))] = (worker, ticket)

    def next(self) -> tuple[Any, Attempt | None]:
        """Wait for the next result and return it with its ticket; the result is None if the worker was lost."""
        (done, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker, ticket = self._busy.pop(done)
        try:
            attempt: Attempt = self._ray.get(done)
        except self._ray.exceptions.RayActorError:
            self._idle.append(self._new())
            return ticket, None
        except self._ray.exceptions.RayTaskError as error:
            raise WorkbenchError(
                f"a worker of the cluster failed: {error.cause}", "Set WORKBENCH_DEBUG=1 to see the traceback."
            ) from error
        self._idle.append(worker)
        return ticket, attempt


def _score_controls(search: Search, pool: _Pool) -> None:
    """Score the controls on all workers and add them in their order."""
    entries = controls(search)
    answers_of = _score_all(search, pool, entries)
    for entry in entries:
        add_control(search, entry, answers_of[entry.name])
    if mixed := mixture(search):
        add_control(search, mixed, _score_all(search, pool, [mixed])[mixed.name])


def _score_all(search: Search, pool: _Pool, entries: Sequence[LineupEntry]) -> dict[str, Any]:
    """Score configurations on all workers; return their answers by name."""
    queue, lost, answers = list(entries), 0, {}
    while queue or pool.busy:
        while queue and pool.idle:
            pool.submit(queue[0], [], queue.pop(0))
        entry, attempt = pool.next()
        if attempt is None:
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


def _score_arm(search: Search, study: Study, clock: Clock, pool: _Pool, arm: Any, most: int | None) -> None:
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
            pool.submit(candidate(search, trial.name, trial.values), rivals(search, study), trial)
        ended = ended or pool.idle
        if not pool.busy:
            return
        trial, attempt = pool.next()
        if attempt is None:
            losses[trial.name] = losses.get(trial.name, 0) + 1
            search.events({"stage": "search", "text": f"{trial.name}: its worker was lost, scoring again"})
            if losses[trial.name] < LOSSES:
                lost_trials.append(trial)
                continue
            attempt = Attempt(None, {"error": f"{LOSSES} workers were lost while scoring it", "stopped": False, "seconds": {}})
        keep(search, study, clock, trial, attempt, time.perf_counter() - started[trial.name])

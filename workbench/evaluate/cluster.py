"""Score configurations on a Ray cluster: workers keep models in memory and score one configuration under one plan at a time.

Only this file imports ray.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from workbench.evaluate import evaluate
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.progress import SideBySide
from workbench.evaluate.scoring import check_calibration, refuse_stateful, score_all
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Event, Events, no_events
from workbench.ground.lazy import torch
from workbench.ground.trust import VARIABLE, is_trusted
from workbench.models.identity import pick_device
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Scores, ScoreStore

LOSSES = 3
"""Number of workers that may be lost during one call before the call counts as failed."""


@contextmanager
def cluster() -> Iterator[Any]:
    """Yield ray, connected to the cluster of RAY_ADDRESS, or to a new one on this machine; disconnect afterwards if this call connected it.

    Raises:
        WorkbenchError: If ray is not installed.
    """
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


class Pool:
    """The idle workers, and the busy workers with their tasks. A worker that is lost is replaced.

    Args:
        ray: The connected module, as `cluster` yields it.
        worker: Class of the workers, with a method `score`.
        arguments: Arguments of its constructor.
        count: Number of workers; default: one per GPU of the cluster, or one per two CPUs.
        trusted: Workers may load the project's method files, whatever the settings on their node say.

    Raises:
        WorkbenchError: If the cluster has too few resources.
    """

    def __init__(
        self, ray: Any, worker: type, arguments: tuple[Any, ...], count: int | None = None, trusted: bool = False
    ) -> None:
        self._ray, self._hosted = ray, (worker, arguments, Path.cwd(), trusted)
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
        return self._ray.remote(_Hosted).options(**self._needs).remote(self._threads, *self._hosted)

    @property
    def idle(self) -> bool:
        """True if a worker is idle."""
        return bool(self._idle)

    @property
    def busy(self) -> bool:
        """True if a worker is busy."""
        return bool(self._busy)

    def submit(self, ticket: Any, *arguments: Any) -> None:
        """Call `score` of an idle worker.

        Args:
            ticket: Value that `next` returns with the result.
            arguments: Arguments of the call.
        """
        worker = self._idle.pop()
        self._busy[worker.score.remote(*arguments)] = (worker, ticket)

    def next(self) -> tuple[Any, Any, bool]:
        """Wait for the next result.

        Returns:
            The ticket, the result, and True if there is no result because the worker was lost.

        Raises:
            WorkbenchError: If a worker failed.
        """
        (done, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker, ticket = self._busy.pop(done)
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayActorError:
            self._idle.append(self._new())
            return ticket, None, True
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, WorkbenchError):
                raise error.cause from error
            raise WorkbenchError(
                f"a worker of the cluster failed: {error.cause}", "Set WORKBENCH_DEBUG=1 to see the traceback."
            ) from error
        self._idle.append(worker)
        return ticket, result, False


class _Hosted:
    """A worker in a process of the cluster, in the directory of the process that started it, which all nodes must share."""

    def __init__(self, threads: int, worker: type, arguments: tuple[Any, ...], directory: Path, trusted: bool) -> None:
        os.chdir(directory)
        torch.set_num_threads(threads)
        if trusted:
            os.environ[VARIABLE] = "1"
        self._worker = worker(*arguments)

    def score(self, *arguments: Any) -> Any:
        return self._worker.score(*arguments)


@dataclass(frozen=True)
class Subjects:
    """What is scored, and where scores are kept. The store must have the same path on all nodes.

    Attributes:
        entries: The configurations.
        plans: The plans.
        store: Store of scores.
        runs: Directory of runs.
        device: auto, cpu, cuda or cuda:N, on the worker's node.
        server: Address of the server that serves configurations by name.
    """

    entries: Sequence[LineupEntry]
    plans: Sequence[ScorePlan]
    store: ScoreStore
    runs: Path
    device: str = "auto"
    server: str | None = None


@dataclass(frozen=True)
class Unit:
    """One call of a worker.

    Attributes:
        name: Name of the configuration.
        plan: Digest of the plan; None if only the digest of the configuration is wanted.
        suite: Name of the plan's suite; two suites with equal items have one digest.
        items: Number of the plan's items, for progress.
    """

    name: str
    plan: str | None = None
    suite: str = ""
    items: int = 0

    @property
    def work(self) -> tuple[str, str]:
        """The configuration and the plan, by which progress is counted."""
        return self.name, f"{self.suite}-{self.plan}"

    def __str__(self) -> str:
        return f"{self.name}: {self.suite}" if self.plan else f"{self.name}: composing"


class Worker:
    """One process of the cluster."""

    def __init__(self, opening: Callable[[], Subjects]) -> None:
        self._subjects = opening()

    def score(self, unit: Unit) -> None:
        """Score a configuration under a plan, or compute the configuration's digest; both are stored.

        Raises:
            WorkbenchError: If this node's files give other configurations or plans.
        """
        from workbench.run.materialize import configuration_digest

        subjects = self._subjects
        entries = [entry for entry in subjects.entries if entry.name == unit.name]
        if entries and unit.plan is None:
            configuration_digest(entries[0].resolved, pick_device(subjects.device))
            return
        both = [plan.by(scorer) for plan in subjects.plans for scorer in (plan.scorer, "hflm")]
        plans = [plan for plan in both if (plan.suite.suite, plan.digest) == (unit.suite, unit.plan)][:1]
        if not (entries and plans):
            raise WorkbenchError(
                f"{unit}: a node of the cluster finds other configurations or suites than the node where this command runs",
                "All nodes must read the same project at the same path, with the same versions of the workbench and of lm-eval.",
            )
        device = pick_device(subjects.device)
        score_all(entries, plans, subjects.store, device=device, runs=subjects.runs, server=subjects.server)


def score_on_cluster(
    opening: Callable[[], Subjects], subjects: Subjects, workers: int | None = None, events: Events = no_events
) -> list[Scores]:
    """Score every configuration under every plan on the cluster of RAY_ADDRESS, or in several processes on this machine.

    Nothing is scored twice: configurations with equal weights are found first. A lost worker is replaced, and what it was scoring goes
    on where it stopped.

    Args:
        opening: Opens the subjects on a worker; it is pickled.
        subjects: What it returns here.
        workers: Number of workers; default: one per GPU of the cluster, or one per two CPUs.
        events: Receives progress.

    Raises:
        WorkbenchError: If ray is not installed, the cluster has too few resources, or a worker fails.
    """
    check_calibration(subjects.entries, subjects.plans, subjects.store)
    unknown = [Unit(entry.name) for entry in subjects.entries if entry.digest() is None]
    if unknown or any(_unscored(subjects)):
        trusted = any(is_trusted(entry.resolved.recipe.project) for entry in subjects.entries)
        with cluster() as ray:
            pool = Pool(ray, Worker, (opening,), workers, trusted)
            names = [entry.name for entry in subjects.entries]
            _run(pool, unknown, _Line(names, unknown, events))
            refuse_stateful(subjects.entries, subjects.plans, subjects.store, pick_device(subjects.device), events)
            for _ in range(2):  # if a scorer was refused for one configuration, all are scored again, by hflm
                units = list(_unscored(subjects))
                _run(pool, units, _Line(names, units, events))
    return list(_stored(subjects))


def _stored(subjects: Subjects) -> Iterator[Scores]:
    """Yield the scores of every configuration under every plan; a configuration with the weights of another one is added to its scores."""
    entries, store = subjects.entries, subjects.store
    plans = [store.settled(plan, [entry.key(plan) for entry in entries]) for plan in subjects.plans]
    for entry in entries:
        digest = entry.digest()
        for plan in plans:
            key = entry.key(plan)
            if digest is None or key is None or not store.has(plan, key):
                raise WorkbenchError(
                    f"the cluster has finished, but {store.root} has no scores of {entry.name} on {plan.suite.suite}",
                    "All nodes must write to this directory: put the project, or --runs-dir, on a file system that they share.",
                )
            yield evaluate(entry.plan(plan), store, entry.configuration(digest), partial(_never, entry.name))


def _never(name: str) -> None:
    raise AssertionError(f"{name} is scored already")


def _unscored(subjects: Subjects) -> Iterator[Unit]:
    """Yield what is not scored yet, once for configurations of equal content."""
    for plan in subjects.plans:
        settled, seen = subjects.store.settled(plan, [entry.key(plan) for entry in subjects.entries]), set()
        for entry in subjects.entries:
            key = entry.key(settled)
            if key not in seen and not (key and subjects.store.has(settled, key)):
                items = sum(len(task_items) for task_items in settled.items.values())
                yield Unit(entry.name, settled.digest, settled.suite.suite, items)
            seen.add(key)


class _Line:
    """Tells the progress of the workers in the words of an evaluation in one process.

    Args:
        names: Names of all configurations, in order.
        units: Calls of the workers.
        events: Receives the progress.
    """

    def __init__(self, names: Sequence[str], units: Sequence[Unit], events: Events) -> None:
        self._names, self._events = list(names), events
        self._whole = SideBySide(names, {unit.work: unit.items for unit in units if unit.plan})

    def begin(self, unit: Unit) -> None:
        """Tell that a worker starts a unit."""
        if unit.plan is None:
            self._events({**self._head(unit), "text": "composing"})
        else:
            self._whole.begin(unit.work)
            self._tell(unit, 0)

    def lost(self, unit: Unit) -> None:
        """Tell that a worker was lost over a unit, which starts again."""
        self._events({"stage": "score", "text": f"{unit}: its worker was lost, scoring again"})

    def finish(self, unit: Unit) -> None:
        """Tell that a worker has finished a unit."""
        if unit.plan is not None:
            self._whole.finish(unit.work)
            self._tell(unit, unit.items)
            self._events({**self._head(unit), "scored": unit.suite, "overall": self._whole.told()})

    def _tell(self, unit: Unit, done: int) -> None:
        text, whole = f"{unit.suite}: {unit.items} items", self._whole.told()
        self._events({**self._head(unit), "done": done, "total": unit.items, "text": text, "overall": whole})

    def _head(self, unit: Unit) -> Event:
        number = self._names.index(unit.name) + 1
        return {"stage": "score", "configuration": unit.name, "number": number, "of": len(self._names)}


def _run(pool: Pool, units: Sequence[Unit], line: _Line) -> None:
    """Let the workers do all units."""
    queue, lost = list(units), Counter[Unit]()
    while queue or pool.busy:
        while queue and pool.idle:
            line.begin(queue[0])
            pool.submit(queue[0], queue.pop(0))
        unit, _, was_lost = pool.next()
        if not was_lost:
            line.finish(unit)
            continue
        lost[unit] += 1
        if lost[unit] == LOSSES:
            raise WorkbenchError(
                f"{unit}: {LOSSES} workers of the cluster were lost over it", "Check the cluster's memory with `ray status`."
            )
        line.lost(unit)
        queue.append(unit)

"""List what a project has: recipes, runs, scores and searches, and what is in progress.

A file is read again only if it has changed. One that cannot be read is listed with the reason.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from workbench.api.naming import load_named, recipe_files
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json
from workbench.ground.holding import Holder
from workbench.ground.identity import FileIdentity, identity_of
from workbench.ground.project import find_project, runs_of
from workbench.recipe.recipe import Recipe
from workbench.run.directory import LOG, RunDirectory, SeenRun, list_runs
from workbench.scores.documents import DESIGN_ORDER, Scores, plan_record, read_document
from workbench.scores.plan import PlanRecord
from workbench.scores.store import SCORED, ScoreStore, outdated
from workbench.search.result import RESULT, SearchResult

T = TypeVar("T")
_TAIL = 16 << 10
"""Bytes that are read from the end of a log."""


@dataclass(frozen=True)
class PlanLine:
    """The stored scores of a suite under one plan.

    Attributes:
        problems: Documents that cannot be read, with reasons.
        outdated: Why the scores are not compared any more; None if they are.
    """

    folder: str
    record: PlanRecord
    scores: Sequence[Scores]
    problems: Sequence[str]
    outdated: str | None


@dataclass(frozen=True)
class Progress:
    """A run, an evaluation or a search in progress, or that was interrupted.

    Attributes:
        lines: How far it is.
        path: Page of the viewer that shows more.
        quiet: Seconds since its last change.
    """

    kind: str
    name: str
    lines: Sequence[str]
    path: str
    quiet: float


@dataclass
class Folder:
    """The project of the current folder, read when it is asked for."""

    project: Path = field(default_factory=find_project)
    _known: dict[Path, tuple[FileIdentity, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runs_folder = runs_of(self.project)
        self.store = ScoreStore(self.runs_folder / "scores")

    def runs(self) -> dict[str, SeenRun]:
        """Return the runs by name, newest first."""
        found = list_runs(self.runs_folder, lambda path: self._of(path, lambda path: RunDirectory(path.parent).record))
        return {run.name: run for run in found}

    def recipes(self) -> dict[str, Recipe | str]:
        """Return the recipes by file, or why one is invalid."""
        read = _or_problem(lambda path: load_named(str(path)))
        return dict(_each(recipe_files(), lambda path: (path.name, self._of(path, read))))

    def plans(self) -> dict[str, PlanLine]:
        """Return the plans with stored scores by folder, the newest first."""
        found = list(_each(self.store.root.glob("*/plan.json"), self._plan))
        found.sort(key=lambda plan: max((s.created for s in plan.scores), default=""), reverse=True)
        return {plan.folder: plan for plan in found}

    def _plan(self, path: Path) -> PlanLine:
        read = [self._of(one, _or_problem(read_document)) for one in path.parent.glob("*.json") if one != path]
        scores = [one for one in read if isinstance(one, Scores)]
        scores.sort(key=lambda s: (DESIGN_ORDER.index(s.configuration.role), s.configuration.name))
        record = self._of(path, lambda path: plan_record(path.parent))
        return PlanLine(path.parent.name, record, scores, [one for one in read if isinstance(one, str)], outdated(record, scores))

    def searches(self) -> dict[str, SearchResult | str | None]:
        """Return the result of each search by its folder, the newest first: None without one, the error of one that cannot be read."""
        folders = [path for path in (self.runs_folder / "search").glob("*-????????") if path.is_dir()]
        folders.sort(key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
        files = {path.name: path / RESULT for path in folders}
        return {name: self._of(file, _or_problem(SearchResult.read)) if file.is_file() else None for name, file in files.items()}

    def neurons(self) -> dict[str, Path]:
        """Return the pages that `analyze` wrote, by the folder and name of the file."""
        return {f"{path.parent.name}/{path.name}": path for path in sorted((self.runs_folder / "neurons").glob("*/*.html"))}

    def in_progress(self) -> list[Progress]:
        """Return runs, evaluations and searches that have begun and have not ended, the busiest first."""
        searches = (self.runs_folder / "search" / name for name, found in self.searches().items() if found is None)
        found = [
            *_each(self.runs_folder.glob("*/.holder"), _run_now),
            *_each(self.store.root.glob("*/*.partial"), self._scored_now),
            *(Progress("search", one.name, [], f"/searches/{one.name}", _age(one / "journal.log")) for one in searches),
        ]
        return sorted((work for work in found if work), key=lambda work: work.quiet)

    def _scored_now(self, partial: Path) -> Progress:
        files = sorted(partial.glob("*"))
        done = [f.name.removesuffix(".json.gz") for f in files if f.name.endswith(".json.gz")]
        lines = [f"finished tasks: {', '.join(done)}"] if done else []
        for journal in (f for f in files if f.suffix == ".jsonl" and f.stem not in done):
            answers = self._of(journal, lambda path: path.read_bytes().count(b"\n")) - 1  # its first line is no answer
            lines.append(f"{journal.stem}: {max(answers, 0):,} answers are stored")
        process = Holder.of(partial.with_suffix(".lock"))
        lines += [str(process)] if process and not process.gone else []
        scored = read_json(partial / SCORED, name=str)
        suite, name = partial.parent.name.rpartition("-")[0], scored["name"] if scored else f"configuration {partial.stem}"
        return Progress("evaluation", f"{suite}: {name}", lines, "/scores", min(map(_age, [partial, *files])))

    def _of(self, path: Path, read: Callable[[Path], T]) -> T:
        """Return what is read from a file, or what was read before if the file is the same."""
        state = identity_of(path)
        known = self._known.get(path)
        if known is None or known[0] != state or not state.is_telling:
            known = self._known[path] = state, read(path)
        value: T = known[1]
        return value


def log_lines(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the last events of a run's log."""
    found = []
    with suppress(OSError), (run.path / LOG).open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL))
        for line in stream.read().splitlines():
            with suppress(ValueError, RecursionError):  # the first one may be cut
                event = json.loads(line)
                found += [event] if isinstance(event, dict) else []
    return found


def _run_now(note: Path) -> Progress | None:
    """Return the run of a process that holds it; None if that process is gone. One of another host counts until it removes its note."""
    run, process = RunDirectory(note.parent), Holder.of(note.with_name(".lock"))
    if process is None or process.gone:
        return None
    last = [str(line["text"]) for line in log_lines(run) if line.get("text")][-1:]
    return Progress("run", run.name, [*last, str(process)], f"/runs/{run.name}", _age(run.path / LOG))


def _or_problem(read: Callable[[Path], T]) -> Callable[[Path], T | str]:
    """Return a function that reads a file, or returns the first line of the error."""

    def either(path: Path) -> T | str:
        try:
            return read(path)
        except WorkbenchError as error:
            return error.message.splitlines()[0]

    return either


def _each(paths: Iterable[Path], read: Callable[[Path], T]) -> Iterator[T]:
    """Yield what is read from each path; what another process removes meanwhile, and a damaged plan, is left out."""
    for path in paths:
        with suppress(OSError, WorkbenchError):
            yield read(path)


def _age(path: Path) -> float:
    """Return the seconds since a file's last change; a missing one is old."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return float("inf")

"""What a project has: recipes, runs, scores and searches, listed from sizes and times of files and from small records.

A record is read again only if its size or time has changed. One that cannot be read is listed with the reason.
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
from workbench.errors import WorkbenchError
from workbench.files import read_json
from workbench.project import find_project, runs_of
from workbench.run.directory import LOG, RECORD, RunDirectory
from workbench.scores.documents import DESIGN_ORDER, Scores, plan_record, read_document
from workbench.scores.plan import PlanRecord
from workbench.scores.store import ScoreStore, outdated
from workbench.search.result import RESULT, SearchResult

T = TypeVar("T")
_TAIL = 16 << 10
"""Bytes that are read from the end of a log."""


@dataclass(frozen=True)
class RunLine:
    """A run in a list.

    Attributes:
        seal: "whole" if names and sizes of its files are as sealed, "broken", "not sealed" for a run of an earlier version, or ""
            for one that has not finished.
        harm: What differs from the seal.
    """

    name: str
    status: str
    recipe: str
    created: str
    bytes: int | None
    seal: str
    harm: Sequence[str]


@dataclass(frozen=True)
class RecipeLine:
    """A recipe in a list; `problem` says why it is invalid."""

    name: str
    file: str
    text: str = ""
    base: str = ""
    steps: str = ""
    bricks: Sequence[str] = ()
    searches: bool = False
    problem: str = ""


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
class Work:
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
    _known: dict[Path, tuple[tuple[int, int], Any]] = field(default_factory=dict)

    @property
    def runs_folder(self) -> Path:
        """Folder of runs and scores."""
        return runs_of(self.project)

    @property
    def store(self) -> ScoreStore:
        """The score store."""
        return ScoreStore(self.runs_folder / "scores")

    def runs(self) -> list[RunLine]:
        """Return the runs, newest first."""
        found = list(_each(self.runs_folder.glob(f"*/{RECORD}"), self._run))
        return sorted(found, key=lambda run: (run.created, run.name), reverse=True)

    def _run(self, path: Path) -> RunLine:
        status, recipe, created, size, sealed = self._of(path, _record_line)
        harm = [str(one) for one in RunDirectory(path.parent).harm()] if status == "done" else []
        seal = "" if status != "done" else "broken" if harm else "whole" if sealed else "not sealed"
        return RunLine(path.parent.name, status, recipe, created, size, seal, harm)

    def recipes(self) -> list[RecipeLine]:
        """Return the recipes by name."""
        return list(_each(recipe_files(), lambda path: self._of(path, _recipe_line)))

    def plans(self) -> list[PlanLine]:
        """Return the plans with stored scores, the newest first."""
        found = list(_each(self.store.root.glob("*/plan.json"), self._plan))
        return sorted(found, key=lambda plan: max((s.created for s in plan.scores), default=""), reverse=True)

    def _plan(self, path: Path) -> PlanLine:
        read = [self._of(one, _document) for one in path.parent.glob("*.json") if one != path]
        scores = [one for one in read if isinstance(one, Scores)]
        scores.sort(key=lambda s: (DESIGN_ORDER.index(s.configuration.role), s.configuration.name))
        record = self._of(path, lambda path: plan_record(path.parent))
        return PlanLine(path.parent.name, record, scores, [one for one in read if isinstance(one, str)], outdated(record, scores))

    def searches(self) -> dict[str, SearchResult | str | None]:
        """Return the result of each search by its folder, the newest first: None without one, the error of one that cannot be read."""
        folders = [path for path in (self.runs_folder / "search").glob("*-????????") if path.is_dir()]
        folders.sort(key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
        return {path.name: self._of(path / RESULT, _search) if (path / RESULT).is_file() else None for path in folders}

    def in_progress(self) -> list[Work]:
        """Return runs, evaluations and searches that have begun and have not ended, the busiest first."""
        found = [
            *_each(self.runs_folder.glob("*/.holder"), _run_now),
            *_each(self.store.root.glob("*/*.partial"), self._scored_now),
            *(self._searched_now(name) for name, found in self.searches().items() if found is None),
        ]
        return sorted((work for work in found if work), key=lambda work: work.quiet)

    def _scored_now(self, partial: Path) -> Work:
        files = sorted(partial.glob("*"))
        done = [f.name.removesuffix(".json.gz") for f in files if f.name.endswith(".json.gz")]
        lines = [f"finished tasks: {', '.join(done)}"] if done else []
        for journal in (f for f in files if f.suffix == ".jsonl" and f.stem not in done):
            lines.append(f"{journal.stem}: {self._of(journal, _line_count):,} answers are stored")
        suite = partial.parent.name.rpartition("-")[0]
        return Work("evaluation", f"{suite}: configuration {partial.stem}", lines, "/scores", min(map(_age, [partial, *files])))

    def _searched_now(self, name: str) -> Work:
        return Work("search", name, [], f"/searches/{name}", _age(self.runs_folder / "search" / name / "journal.log"))

    def _of(self, path: Path, read: Callable[[Path], T]) -> T:
        """Return what is read from a file, or what was read before if its size and time are the same."""
        stat = path.stat()
        state = stat.st_mtime_ns, stat.st_size
        known = self._known.get(path)
        if known is None or known[0] != state:
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


def _run_now(holder: Path) -> Work | None:
    """Return the run of a process that holds it; None if that process is gone."""
    run, since = RunDirectory(holder.parent), read_json(holder, pid=int)
    if since is None or not _alive(since["pid"]):
        return None
    last = [str(line["text"]) for line in log_lines(run) if line.get("text")][-1:]
    return Work("run", run.name, [*last, f"process {since['pid']}"], f"/runs/{run.name}", _age(run.path / LOG))


def _record_line(path: Path) -> tuple[str, str, str, int | None, bool]:
    """Return status, recipe, time, size and whether it is sealed, of a run.json, which may hold anything."""
    record = read_json(path, status=str, created=str)
    if record is None:
        return "damaged", "", "", None, False
    output = record.get("output")
    size = output.get("bytes") if isinstance(output, dict) else None
    return (
        record["status"],
        str(record.get("name") or ""),
        record["created"],
        size if isinstance(size, int) else None,
        bool(record.get("manifest")),
    )


def _recipe_line(path: Path) -> RecipeLine:
    try:
        recipe = load_named(str(path))
    except WorkbenchError as error:
        return RecipeLine(path.stem, path.name, problem=error.message.splitlines()[0])
    steps, fields = ", ".join(f"{step.verb} {step.name}" for step in recipe.steps), recipe.fields
    searches = fields.search is not None
    return RecipeLine(recipe.name, path.name, fields.description or "", fields.base_name, steps, tuple(fields.bricks), searches)


def _document(path: Path) -> Scores | str:
    """Return a scores document, or the message of the error."""
    try:
        return read_document(path)
    except WorkbenchError as error:
        return error.message


def _search(path: Path) -> SearchResult | str:
    """Return the result of a search, or the message of the error."""
    try:
        return SearchResult.read(path)
    except WorkbenchError as error:
        return error.message


def _each(paths: Iterable[Path], read: Callable[[Path], T]) -> Iterator[T]:
    """Yield what is read from each path; what another process removes meanwhile, and a damaged plan, is left out."""
    for path in paths:
        with suppress(OSError, WorkbenchError):
            yield read(path)


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _age(path: Path) -> float:
    """Return the seconds since a file's last change; a missing one is old."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return float("inf")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True

"""Merging of score stores: the scores of another project or machine are added to this store, and nothing is overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.files import bytes_digest, write_bytes
from workbench.ground.results import JsonObject
from workbench.scores.documents import Alias, Configuration, Scores, plan_record, read_document, write_document
from workbench.scores.files import unpacked
from workbench.scores.plan import PlanRecord
from workbench.scores.store import ScoreStore

ITEMS, PLAN = "items.jsonl.gz", "plan.json"


class PulledConfiguration(JsonObject):
    """A configuration's scores in the other store."""

    suite: str
    """Name of the suite."""
    plan: str
    """Digest of the plan."""
    name: str
    """Name of the configuration."""
    key: str
    """Digest under which the scores are stored."""
    status: Literal["pulled", "same", "named"]
    """Outcome: the scores were taken, were here already, or were here and got names of the other store."""


class RefusedScores(JsonObject):
    """A file of the other store that was not taken."""

    file: str
    """The file, below the other store."""
    reason: str
    """Reason for not taking it."""


class Pulled(JsonObject):
    """The result of merging another score store."""

    source: str
    """Folder of the other store."""
    dry_run: bool
    """True if nothing was written."""
    plans: list[str] = []
    """Folders of the plans that this store did not have."""
    documents: list[PulledConfiguration] = []
    """Scores that were taken, or were here already."""
    refused: list[RefusedScores] = []
    """Files that were not taken; the command then exits with 1."""
    notes: list[str] = []
    """Differences that change no scores, such as other versions of a library."""

    def count(self, status: str) -> int:
        """Return the number of documents with a status."""
        return sum(document.status == status for document in self.documents)


def store_in(folder: Path) -> Path:
    """Return the score store of a project, of a folder of runs, or the folder itself if it is a store.

    Raises:
        UsageError: If the folder holds no store.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: the folder does not exist", "Name a project, its runs folder, or a score store.")
    for place in (folder / "runs" / "scores", folder / "scores", folder):
        if place.is_dir() and any(place.glob(f"*/{PLAN}")):
            return place
    raise UsageError(
        f"{folder}: found no scores: neither runs/scores/SUITE-PLAN/plan.json, nor scores/SUITE-PLAN/plan.json, nor SUITE-PLAN/plan.json",
        "Name a project, its runs folder, or a score store.",
    )


def pull_scores(source: Path, store: ScoreStore, *, dry_run: bool = False) -> Pulled:
    """Add the scores of another store to a store.

    Plans are the same if their digests are. A document is taken if its plan, items and rows are whole and agree, and this store has no
    scores under its key. If this store has the same rows, it only gets the names that it lacks. Other rows under one key, other items under
    one plan, damaged files, documents of other formats and unfinished evaluations are listed and left where they are. Every file is written
    as a whole, the document of scores last.

    Args:
        source: Folder of the other store.
        store: The store that gets the scores.
        dry_run: Read and compare only.

    Raises:
        UsageError: If both are the same folder.
    """
    if store.root.exists() and source.resolve() == store.root.resolve():
        raise UsageError(f"{source}: this is the store that would get the scores", "Name another project.")
    pulled = Pulled(source=str(source), dry_run=dry_run)
    for folder in sorted(p for p in source.iterdir() if p.is_dir()):
        if any(folder.glob("*.json")):
            _Plan(folder, store, pulled).pull()
    return pulled


@dataclass(frozen=True)
class _Plan:
    """A plan's folder in the other store, and where its scores go."""

    folder: Path
    store: ScoreStore
    pulled: Pulled

    @property
    def target(self) -> Path:
        return self.store.root / self.folder.name

    def pull(self) -> None:
        """Take the folder's scores."""
        try:
            record = plan_record(self.folder)
            self._check_plan(record)
        except WorkbenchError as error:
            self._refuse(self.folder / PLAN, f"{_shortened(error, self.folder / PLAN)}; its scores were not taken")
            return
        for path in sorted(self.folder.glob("*.json")):
            if path.name != PLAN:
                try:
                    self._document(path)
                except WorkbenchError as error:
                    self._refuse(path, _shortened(error, path))
        for path in sorted(self.folder.glob("*.partial")):
            self._refuse(path, "an unfinished evaluation; finish it on its machine")
        self._refusals()

    def _check_plan(self, record: PlanRecord) -> None:
        """Compare the plan with that of this store."""
        name = f"{record.name}-{record.plan[:12]}"
        if self.folder.name != name:
            raise WorkbenchError(f"{self.folder / PLAN}: it has the plan of {name}")
        if not (self.target / PLAN).is_file():
            self.pulled.plans.append(name)
            return
        own = plan_record(self.target)
        if own.plan != record.plan:
            raise WorkbenchError(
                f"{self.folder / PLAN}: this store has another plan under this name ({own.plan}, not {record.plan})"
            )
        for library, version in record.versions.items():
            if own.versions.get(library) != version:
                self.pulled.notes.append(f"{name}: scored with {library} {version}, here with {own.versions.get(library)}")
        if own.suite != record.suite:
            self.pulled.notes.append(f"{name}: other analysis settings of the suite; those of this store stay")

    def _document(self, path: Path) -> None:
        """Take one document with its rows and items."""
        source = ScoreStore(self.folder.parent)
        scores = read_document(path)
        if scores.rows is None:
            raise WorkbenchError(
                f"{path}: an earlier version stored these scores without a digest of their rows; score them again there"
            )
        if path.stem != scores.key[:12]:
            raise WorkbenchError(f"{path}: it has the scores of {scores.key[:12]}")
        source.rows(scores)
        source.items(scores)
        own_path = self.target / path.name
        if own_path.exists():
            self._same(path, scores, read_document(own_path), own_path)
            return
        rows, items = path.with_suffix(".jsonl.gz"), self.folder / ITEMS
        own_items = self.target / ITEMS
        if own_items.is_file() and _content(own_items) != scores.items:
            raise WorkbenchError(f"{path}: this store has other items under the plan ({own_items})")
        files = {
            **({} if (self.target / PLAN).is_file() else {PLAN: (self.folder / PLAN).read_bytes()}),
            **({} if own_items.is_file() else {ITEMS: items.read_bytes()}),
            rows.name: rows.read_bytes(),
            path.name: path.read_bytes(),
        }
        if not self.pulled.dry_run:
            for name, data in files.items():
                write_bytes(self.target / name, data)
        self._add(scores, "pulled")

    def _same(self, path: Path, scores: Scores, own: Scores, own_path: Path) -> None:
        """Give this store's document the names that it lacks; other scores under its key are refused."""
        if own.key != scores.key:
            raise WorkbenchError(
                f"{path}: {own_path} has another configuration whose key begins alike ({own.key}, not {scores.key})"
            )
        if own.rows is None:
            raise WorkbenchError(
                f"{path}: {own_path} has them from an earlier version without a digest of their rows; delete it and pull again"
            )
        if own.plan != scores.plan or own.rows != scores.rows or own.items != scores.items:
            what = ", ".join(_differences(own, scores)) or "the rows of single items"
            raise WorkbenchError(
                f"{path}: other scores of the same configuration under the same plan: {what}; those of this store ({own_path}) stay"
            )
        ScoreStore(self.store.root).rows(own)  # the file here must be whole, or the other store's is the better one
        merged = own
        others: list[Configuration | Alias] = [scores.configuration, *scores.aliases]
        for other in others:
            if other.name not in merged.names:
                alias = Alias(name=other.name, role=other.role, recipe=other.recipe, digest=other.digest)
                merged = merged.model_copy(update={"aliases": (*merged.aliases, alias)})
        if merged is own:
            self._add(scores, "same")
            return
        if not self.pulled.dry_run:
            write_document(own_path, merged)
        self._add(scores, "named")

    def _refusals(self) -> None:
        """Take the records of scorers that failed their check, which decide under which plan all configurations are scored."""
        for path in sorted((self.folder / "refused").glob("*.txt")):
            target = self.target / "refused" / path.name
            if not target.exists():
                self.pulled.notes.append(f"{self.folder.name}: its scorer failed its check on {path.stem}; recorded here, too")
                if not self.pulled.dry_run:
                    write_bytes(target, path.read_bytes())

    def _add(self, scores: Scores, status: Literal["pulled", "same", "named"]) -> None:
        self.pulled.documents.append(
            PulledConfiguration(
                suite=scores.suite, plan=scores.plan, name=scores.configuration.name, key=scores.key, status=status
            )
        )

    def _refuse(self, path: Path, reason: str) -> None:
        self.pulled.refused.append(RefusedScores(file=str(path.relative_to(self.folder.parent)), reason=reason))


def _content(path: Path) -> str | None:
    """Return the digest of a compressed file's content, or None if it is damaged."""
    data = unpacked(path)
    return None if data is None else bytes_digest(data)


def _differences(own: Scores, scores: Scores) -> Iterator[str]:
    """Yield tasks and metrics whose values differ, as "task metric 0.5 here, 0.6 there"."""
    for task in sorted({*own.tasks, *scores.tasks}):
        here, there = own.tasks.get(task), scores.tasks.get(task)
        if here is None or there is None:
            yield f"{task} is scored {'there' if here is None else 'here'} only"
            continue
        for metric in sorted({*here.metrics} & {*there.metrics}):
            if (a := here.metrics[metric].value) != (b := there.metrics[metric].value):
                yield f"{task} {metric} {a:.4g} here, {b:.4g} there"


def _shortened(error: WorkbenchError, path: Path) -> str:
    """Return an error's message without the path of the file in front of it, which is named separately."""
    return error.message.removeprefix(f"{path}: ")

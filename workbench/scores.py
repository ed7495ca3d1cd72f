"""Scores as documents, and the store that keeps them by plan and configuration."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from workbench.errors import WorkbenchError
from workbench.statistics import ratio, ratio_interval, score_interval
from workbench.suites import MARGIN, Plan
from workbench.weights.saving import write_bytes

Row = dict[str, Any]
Rows = dict[str, list[Row]]  # task -> one row per item, in the plan's order
DESIGN_ORDER = ("base", "brick", "average", "configuration")


@dataclass(frozen=True)
class Configuration:
    """What is scored.

    Attributes:
        digest: Content digest of the weights, 32 hex digits: equal digest, equal scores.
        role: base | brick | average | configuration.
        parents: Names of the bricks it was made from.
        recipe: Project-relative path of its recipe.
        base: Digest of its base.
        parameters, bytes: Of the weights as they would be written as a checkpoint; None where only scores are known.
        bricks: Name -> bytes on disk of the bricks that its steps use.
        edits: Digests of the facts that it was edited for, by its steps or by those bricks.
        first: How many facts of a file its edit has taken, from the start; None: all.
    """

    digest: str
    name: str
    role: str = "configuration"
    parents: tuple[str, ...] = ()
    recipe: str | None = None
    base: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    bricks: Mapping[str, int] = field(default_factory=dict, hash=False)
    edits: tuple[str, ...] = ()
    first: int | None = None

    def __post_init__(self) -> None:
        if self.role not in DESIGN_ORDER:
            raise ValueError(f"role {self.role!r} of {self.name}: expected one of {', '.join(DESIGN_ORDER)}")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Alias(_Document):
    """Another name of the same weights."""

    name: str
    role: str
    recipe: str | None = None


class Metric(_Document):
    """A mean over items, or a ratio of sums over them, with its 95 % interval."""

    value: float
    low: float
    high: float

    @field_validator("low", "high", mode="before")
    @classmethod
    def _endless(cls, value: Any, info: ValidationInfo) -> Any:
        """An interval of a single cluster has no ends; JSON has no infinity and keeps null."""
        return (-math.inf if info.field_name == "low" else math.inf) if value is None else value

    @classmethod
    def of(cls, values: Sequence[Any], cluster: NDArray[np.intp], kind: str | None = None) -> Metric:
        """Of the items' scores; with a `kind` of ratio (`statistics.RATIOS`) of their pairs (numerator, weight)."""
        numbers = np.asarray(values, np.float64)
        if kind:
            low, high = ratio_interval(kind, numbers[:, 0], numbers[:, 1], cluster)
            return cls(value=ratio(kind, numbers[:, 0], numbers[:, 1]), low=low, high=high)
        low, high = score_interval(numbers, cluster)
        return cls(value=float(numbers.mean()), low=low, high=high)


class TaskScores(_Document):
    """Scores on one task; `scorer` is what computed its log-likelihoods, "generate" where there are none."""

    n: int
    metrics: dict[str, Metric]
    seconds: float | None = None
    scorer: str | None = None
    tokens: int | None = None


class Check(_Document):
    """A scorer compared with lm-eval's HFLM on some documents of each task, before its numbers count.

    Attributes:
        documents: How many were compared.
        max_difference: Of log-likelihoods, in nats.
        tolerance: What it may be.
        spread: HFLM's own difference between batch sizes, where the dtype is not float32.
    """

    scorer: str
    documents: int
    max_difference: float
    tolerance: float
    spread: float | None = None


class Scores(_Document):
    """Scores of one configuration under one plan, as stored."""

    version: int = 1
    suite: str
    plan: str
    configuration: Configuration
    aliases: tuple[Alias, ...] = ()
    partial: bool = False
    seconds: float
    device: str
    created: str
    versions: dict[str, str]
    tasks: dict[str, TaskScores]
    check: Check | None = None
    tokens: int | None = None

    @property
    def names(self) -> list[str]:
        """All names of the configuration, the shown one first."""
        return [self.configuration.name, *(alias.name for alias in self.aliases)]

    def also(self, configuration: Configuration) -> Scores:
        """The same scores with one more name of the same weights."""
        return self.model_copy(update={"aliases": (*self.aliases, _alias(configuration))})

    def called(self, configuration: Configuration) -> Scores:
        """The same scores shown under the name that is asked for; all others become aliases."""
        others = tuple(a for a in (_alias(self.configuration), *self.aliases) if a.name != configuration.name)
        return self.model_copy(update={"configuration": configuration, "aliases": others})


def _alias(configuration: Configuration) -> Alias:
    return Alias(name=configuration.name, role=configuration.role, recipe=configuration.recipe)


class Store:
    """Scores under `root`, one folder a plan, one pair of files a configuration.

    Files appear whole or not at all: rows first, the scores document last. While a configuration is being scored, finished tasks
    wait in `<config12>.partial/`, so that an interrupted evaluation scores only the rest.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, suite: str, plan: str) -> Path:
        """Folder of a plan."""
        return self.root / f"{suite}-{plan[:12]}"

    def has(self, plan: Plan, digest: str) -> bool:
        """Whether the configuration's scores under this plan are complete."""
        return self._path(plan.suite.suite, plan.digest, digest).is_file()

    def read(self, plan: Plan, digest: str) -> Scores:
        """Stored scores. Errors: not scored yet, or stored under a colliding name."""
        path = self._path(plan.suite.suite, plan.digest, digest)
        if not path.is_file():
            raise WorkbenchError(
                f"configuration {digest[:12]} has no scores on suite '{plan.suite.suite}' under plan {plan.digest[:12]}",
                "Score it first: workbench eval RECIPE",
            )
        scores = Scores.model_validate_json(path.read_text("utf-8"))
        if scores.configuration.digest != digest or scores.plan != plan.digest:
            raise WorkbenchError(
                f"{path}: scores of {scores.configuration.digest} under plan {scores.plan}, "
                f"expected {digest} under {plan.digest}",
                f"Remove the file and score again: rm {path}",
            )
        return scores

    def list(self, plan: Plan) -> list[Scores]:
        """All complete scores under a plan, in design order, then by name."""
        folder = self.folder(plan.suite.suite, plan.digest)
        return sorted(stored_in(folder), key=lambda s: (DESIGN_ORDER.index(s.configuration.role), s.configuration.name))

    def record(self, scores: Scores) -> dict[str, Any]:
        """The plan.json under which scores were taken."""
        document: dict[str, Any] = json.loads((self.folder(scores.suite, scores.plan) / "plan.json").read_text("utf-8"))
        return document

    def items(self, scores: Scores) -> Rows:
        """Prompts, choices and gold answers of the plan's items."""
        return _read_rows(self.folder(scores.suite, scores.plan) / "items.jsonl.gz")

    def rows(self, scores: Scores) -> Rows:
        """Per-item metrics and answers of a configuration."""
        return _read_rows(self._path(scores.suite, scores.plan, scores.configuration.digest).with_suffix(".jsonl.gz"))

    def write(self, plan: Plan, scores: Scores, rows: Rows, items: Rows) -> None:
        """Keep finished scores; finished tasks that waited beside them are dropped."""
        folder = self.folder(plan.suite.suite, plan.digest)
        path = self._path(plan.suite.suite, plan.digest, scores.configuration.digest)
        self.write_plan(plan)
        if not (folder / "items.jsonl.gz").exists():
            _write_rows(folder / "items.jsonl.gz", items)
        _write_rows(path.with_suffix(".jsonl.gz"), rows)
        write_bytes(path, (scores.model_dump_json(indent=1) + "\n").encode())
        shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)

    def update(self, plan: Plan, scores: Scores) -> None:
        """Rewrite the scores document, after a name was added."""
        write_bytes(
            self._path(plan.suite.suite, plan.digest, scores.configuration.digest),
            (scores.model_dump_json(indent=1) + "\n").encode(),
        )

    def write_plan(self, plan: Plan) -> None:
        """Write plan.json where it is missing or its suite's analysis settings have changed."""
        path = self.folder(plan.suite.suite, plan.digest) / "plan.json"
        data = (json.dumps(plan.document(), indent=1) + "\n").encode()
        if not path.exists() or path.read_bytes() != data:
            write_bytes(path, data)

    def finished_task(self, plan: Plan, digest: str, task: str) -> dict[str, Any] | None:
        """A task's result from an interrupted evaluation."""
        path = self._partial(plan, digest, task)
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        return result if result["digest"] == digest else None

    def keep_task(self, plan: Plan, digest: str, task: str, result: Mapping[str, Any]) -> None:
        """Keep a task's result until the configuration is complete."""
        data = json.dumps({"digest": digest, **result}, ensure_ascii=False).encode()
        write_bytes(self._partial(plan, digest, task), gzip.compress(data, 6, mtime=0))

    def journal(self, plan: Plan, digest: str, task: str) -> Journal:
        """Answers to single requests of a task that is being scored."""
        path = self._partial(plan, digest, task).with_name(f"{task}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        return Journal(path, digest)

    def refuse(self, plan: Plan, reason: str) -> None:
        """Remember that the plan's scorer failed its check: from now on `settled` gives the plan with hflm."""
        write_bytes(self.folder(plan.suite.suite, plan.digest) / "refused.txt", f"{reason}\n".encode())

    def settled(self, plan: Plan) -> Plan:
        """The plan, or the same with hflm where its scorer was refused before."""
        refused = (self.folder(plan.suite.suite, plan.digest) / "refused.txt").is_file()
        return plan.by("hflm") if refused else plan

    def _path(self, suite: str, plan: str, digest: str) -> Path:
        return self.folder(suite, plan) / f"{digest[:12]}.json"

    def _partial(self, plan: Plan, digest: str, task: str) -> Path:
        return self._path(plan.suite.suite, plan.digest, digest).with_suffix(".partial") / f"{task}.json.gz"


def stored_in(folder: Path) -> list[Scores]:
    """All complete scores of a plan's folder, the oldest first."""
    found = [Scores.model_validate_json(p.read_text("utf-8")) for p in folder.glob("*.json") if p.name != "plan.json"]
    return sorted(found, key=lambda s: (s.created, s.configuration.name))


def margin_of(row: Row, item: Row) -> float | None:
    """Log-likelihood of the gold choice minus the largest of the others; of several gold choices the largest counts.

    Taken from the row's metrics, else from its log-likelihoods. None where the gold choice is not known.
    """
    known = row["metrics"].get(MARGIN)
    if known is not None:
        return float(known)
    values, choices, gold = row.get("loglikelihoods"), item.get("choices"), item.get("gold")
    if isinstance(gold, str) and gold.startswith("["):  # several gold choices, as they were written
        with contextlib.suppress(ValueError):
            gold = json.loads(gold)
    right = {g for g in (gold if isinstance(gold, list) else [gold]) if isinstance(g, int)}
    if not values or not choices or len(values) != len(choices):
        return None
    best = [v for i, v in enumerate(values) if i in right]
    others = [v for i, v in enumerate(values) if i not in right]
    return float(max(best) - max(others)) if best and others else None


class Journal:
    """Answers by number of the request, one JSON line each, appended while a task is scored; a line cut by a kill is left out."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self.done: dict[int, Any] = {}
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        whole = []
        for line in lines:
            try:
                number, answer = json.loads(line)
            except ValueError:
                break
            whole.append(line)
            self.done[number] = answer
        if self.done.pop(-1, digest) != digest:  # another configuration of the same first digits
            whole, self.done = [], {}
        if not whole or len(whole) < len(lines):
            write_bytes(path, "".join(f"{line}\n" for line in whole or [json.dumps([-1, digest])]).encode())

    def add(self, answers: Mapping[int, Any]) -> None:
        """Keep some more answers."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([number, answer], ensure_ascii=False) + "\n" for number, answer in answers.items())


def _read_rows(path: Path) -> Rows:
    rows: Rows = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows.setdefault(row["task"], []).append(row)
    return rows


def _write_rows(path: Path, rows: Rows) -> None:
    lines: Iterable[str] = (json.dumps(row, ensure_ascii=False) + "\n" for task in rows.values() for row in task)
    write_bytes(path, gzip.compress("".join(lines).encode(), 6, mtime=0))  # mtime 0: equal rows, equal bytes

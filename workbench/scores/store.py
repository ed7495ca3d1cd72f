"""The score store, which holds scores by plan and configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import bytes_digest, read_json, write_bytes, write_json
from workbench.ground.holding import held
from workbench.ground.results import JsonObject
from workbench.scores.documents import (
    DESIGN_ORDER,
    Check,
    Configuration,
    Metric,
    Scores,
    TaskResult,
    TaskScores,
    disagreement,
    plan_record,
    read_document,
    rescore_hint,
    write_document,
)
from workbench.scores.files import Journal, Packed, Row, Rows, read_rows, unpacked_json, write_rows
from workbench.scores.plan import PLAN_FORMAT, PlanRecord, ScorePlan

__all__ = [
    "DESIGN_ORDER",
    "Check",
    "Configuration",
    "Journal",
    "Metric",
    "Row",
    "Rows",
    "ScoreStore",
    "Scores",
    "TaskResult",
    "TaskScores",
    "plan_record",
    "stored_in",
    "stored_plans",
]

SCORED = "configuration.json"
"""File beside the finished tasks of an interrupted evaluation: the name of the configuration, for those who look on."""
_FORMAT_OF_0_2 = "plan-3 softmax-float32 seed-1234"


class ScoreStore:
    """Scores below `root`, with one folder per plan and one pair of files per configuration.

    Files are written as a whole or not at all: rows first, the scores document last. While a configuration is being scored, its finished
    tasks are kept in `<config12>.partial/`, so that an interrupted evaluation scores only the rest.

    Args:
        root: The folder.
        wait: Seconds that an evaluation waits for another process that scores the same; None: until it ends.
    """

    def __init__(self, root: Path, wait: float | None = None) -> None:
        self.root, self.wait = root, wait

    def folder(self, suite: str, plan: str) -> Path:
        """Return the folder of a plan."""
        return self.root / f"{suite}-{plan[:12]}"

    def has(self, plan: ScorePlan, key: str) -> bool:
        """Return True if the store has complete scores of a configuration under this plan.

        Documents of format 1, which hold no digest of their rows, count as missing, so that they are scored again.

        Raises:
            WorkbenchError: If the document is damaged.
        """
        path = self._path(plan.suite.suite, plan.digest, key)
        return path.is_file() and (document := read_document(path)).rows is not None and document.key == key

    def read(self, plan: ScorePlan, key: str) -> Scores:
        """Return stored scores.

        Raises:
            WorkbenchError: If there are none, they are damaged, or the file holds scores of another configuration or plan.
        """
        path = self._path(plan.suite.suite, plan.digest, key)
        if not path.is_file():
            raise WorkbenchError(
                f"configuration {key[:12]} has no scores on suite '{plan.suite.suite}' under plan {plan.digest[:12]}",
                "Score it first: workbench eval RECIPE",
            )
        scores = read_document(path)
        if scores.key != key or scores.plan != plan.digest:
            raise WorkbenchError(
                f"{path}: found scores of {scores.key} under plan {scores.plan}, expected {key} under {plan.digest}",
                rescore_hint(path),
            )
        return scores

    def list(self, plan: ScorePlan) -> list[Scores]:
        """Return all complete scores under a plan, in design order, then by name."""
        folder = self.folder(plan.suite.suite, plan.digest)
        return sorted(stored_in(folder), key=lambda s: (DESIGN_ORDER.index(s.configuration.role), s.configuration.name))

    def elsewhere(self, plans: Iterable[ScorePlan], names: Iterable[str]) -> str:
        """Say under which plans of these suites configurations of these names have scores that do not count, and why.

        Returns:
            A text that continues a sentence, such as "; scores of base under plan 6a46281a7ac8 are …"; empty if there are none.
        """
        texts = []
        for plan in plans:
            for path in sorted(self.root.glob(f"{plan.suite.suite}-*/plan.json")):
                record, scores = plan_record(path.parent), stored_in(path.parent)
                found = sorted({s.configuration.name for s in scores} & {*names})
                if not found or record.name != plan.suite.suite or record.imported:
                    continue
                now = plan.record()
                compared = ("tokenizer", "scorer", "dtype", "batch_size", "partial", "tasks")
                differing = [key for key in compared if getattr(record, key) != getattr(now, key)]
                reason = outdated(record, scores) or f"another plan: other {', '.join(differing) or 'items or settings'}"
                if record.plan == plan.digest:
                    reason = "their weights are others, or were not read here yet: `workbench eval` tells"
                texts.append(f"; scores of {', '.join(found)} under plan {record.plan[:12]} are not compared ({reason})")
        return "".join(texts)

    def record(self, scores: Scores) -> PlanRecord:
        """Return the content of the plan.json of some scores."""
        return plan_record(self.folder(scores.suite, scores.plan))

    def items(self, scores: Scores) -> Rows:
        """Return prompts, choices and gold answers of the plan's items, checked against the digest in the scores document."""
        return self._read(scores, self.folder(scores.suite, scores.plan) / "items.jsonl.gz", scores.items, answers=False)

    def rows(self, scores: Scores) -> Rows:
        """Return a configuration's metrics and answers by item, checked against the digest, counts and means in the scores document."""
        path = self._path(scores.suite, scores.plan, scores.key).with_suffix(".jsonl.gz")
        rows = self._read(scores, path, scores.rows, answers=True)
        if problem := disagreement(scores, rows):
            raise WorkbenchError(f"{path}: {problem}", rescore_hint(path))
        return rows

    def _read(self, scores: Scores, path: Path, digest: str | None, *, answers: bool) -> Rows:
        document = self._path(scores.suite, scores.plan, scores.key)
        if digest is None:
            raise WorkbenchError(
                f"{document}: an earlier version stored these scores without a digest of their rows", rescore_hint(document)
            )
        return read_rows(path, digest, rescore_hint(path), answers=answers)

    def write(self, plan: ScorePlan, scores: Scores, rows: Rows | Packed, items: Rows | Packed) -> Scores:
        """Store finished scores and delete the intermediate results of their tasks.

        Returns:
            The scores with the key and the digests under which they are stored.
        """
        folder = self.folder(plan.suite.suite, plan.digest)
        path = self._path(plan.suite.suite, plan.digest, scores.configuration.key(plan))
        rows, items = (part if isinstance(part, Packed) else Packed.of(part) for part in (rows, items))
        self.write_plan(plan)
        asked = folder / "items.jsonl.gz"
        if not asked.is_file() or asked.read_bytes() != items.data:
            write_bytes(asked, items.data)
        write_bytes(path.with_suffix(".jsonl.gz"), rows.data)
        stored = scores.model_copy(update={"key": scores.configuration.key(plan), "rows": rows.digest, "items": items.digest})
        write_document(path, stored)
        self.forget_parts(plan, stored.key)
        return stored

    @contextmanager
    def held(self, plan: ScorePlan, key: str, name: str, wait: float | None = None) -> Iterator[None]:
        """Lock the scores of a configuration under a plan for a `with` block, so that one process at a time scores and stores them.

        Args:
            plan: The plan.
            key: Key of the scores.
            name: Name of the configuration.
            wait: Seconds to wait for another process; None: until it ends.

        Raises:
            BusyError: If another process still scores them; the message names it.
        """
        lock = self._path(plan.suite.suite, plan.digest, key).with_suffix(".lock")
        hint = "Run the same command again, with a longer `--wait`: it scores only what the other process has not stored by then."
        with held(lock, f"{name} on {plan.suite.suite}", "is scoring this", hint, wait, once=True):
            yield

    def forget_parts(self, plan: ScorePlan, key: str) -> None:
        """Delete the intermediate results of tasks whose scores are stored."""
        shutil.rmtree(self._path(plan.suite.suite, plan.digest, key).with_suffix(".partial"), ignore_errors=True)

    def update(self, plan: ScorePlan, scores: Scores) -> None:
        """Rewrite the scores document after a name was added."""
        write_document(self._path(plan.suite.suite, plan.digest, scores.key), scores)

    def write_plan(self, plan: ScorePlan) -> None:
        """Write plan.json if it is missing or the suite's analysis settings have changed."""
        path = self.folder(plan.suite.suite, plan.digest) / "plan.json"
        data = (json.dumps(plan.record().to_dict(), indent=1) + "\n").encode()
        if not path.exists() or path.read_bytes() != data:
            write_bytes(path, data)

    def finished_task(self, plan: ScorePlan, key: str, task: str) -> TaskResult | None:
        """Return a task's result from an interrupted evaluation; None if there is none or it is damaged."""
        entry = unpacked_json(self._partial(plan, key, task))
        if not isinstance(entry, dict) or entry.get("digest") != key or entry.get("content") != _content(entry.get("result")):
            return None
        result: TaskResult = entry["result"]
        return result

    def keep_task(self, plan: ScorePlan, key: str, task: str, result: TaskResult) -> None:
        """Keep a task's result until the configuration is complete."""
        data = json.dumps({"digest": key, "content": _content(result), "result": result}, ensure_ascii=False).encode()
        write_rows(self._partial(plan, key, task), data)

    def begin(self, plan: ScorePlan, key: str, name: str) -> None:
        """Note the name of the configuration that is being scored from now on."""
        write_json(self._partial(plan, key, "").with_name(SCORED), {"name": name})

    def journal(self, plan: ScorePlan, key: str, task: str) -> Journal:
        """Return the answers to single requests of a task that is being scored."""
        return Journal(self._partial(plan, key, task).with_name(f"{task}.jsonl"), key)

    def refuse(self, plan: ScorePlan, key: str, reason: str) -> None:
        """Record that the plan's scorer failed its check on a configuration; see `settled`."""
        write_bytes(self._refusal(plan, key), f"{reason}\n".encode())

    def refused(self, plan: ScorePlan, key: str) -> str | None:
        """Return the reason why the plan's scorer cannot be used for a configuration, or None."""
        path = self._refusal(plan, key)
        return path.read_bytes().decode("utf-8", "replace").strip() if path.is_file() else None

    def settled(self, plan: ScorePlan, keys: Iterable[str | None] | None = None) -> ScorePlan:
        """Return the plan with the scorer that works for all configurations: its own, or hflm if its own failed the check on one of them.

        Configurations are comparable only under one scorer.

        Args:
            plan: The plan.
            keys: Keys of the configurations; default: all configurations that were checked under this plan.
        """
        if keys is None:
            refused = any(self._refusal(plan, "").parent.glob("*.txt"))
        else:
            refused = any(key and self._refusal(plan, key).is_file() for key in keys)
        return plan.by("hflm") if refused else plan

    def passed(self, plan: ScorePlan, key: str) -> str | None:
        """Return the name of the configuration on which the plan's scorer passed the whole check under a key; None if there is none."""
        found = read_json(self._passed(plan, key), key=str, configuration=str)
        return str(found["configuration"]) if found and found["key"] == key else None

    def keep_passed(self, plan: ScorePlan, key: str, configuration: str) -> None:
        """Record that the plan's scorer passed the whole check on a configuration."""
        path = self._passed(plan, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "configuration": configuration})

    def _passed(self, plan: ScorePlan, key: str) -> Path:
        return self.folder(plan.suite.suite, plan.digest) / "passed" / f"{key[:12]}.json"

    def _refusal(self, plan: ScorePlan, key: str) -> Path:
        return self.folder(plan.suite.suite, plan.digest) / "refused" / f"{key[:12]}.txt"

    def _path(self, suite: str, plan: str, digest: str) -> Path:
        return self.folder(suite, plan) / f"{digest[:12]}.json"

    def _partial(self, plan: ScorePlan, digest: str, task: str) -> Path:
        return self._path(plan.suite.suite, plan.digest, digest).with_suffix(".partial") / f"{task}.json.gz"


def outdated(record: PlanRecord, scores: Iterable[Scores]) -> str | None:
    """Return why scores are not read by this version any more; None if they are.

    Args:
        record: Content of plan.json. Those of 0.2.0 and earlier have no format; the format changed together with that of the documents.
        scores: The plan's scores.
    """
    if record.imported:
        return None if record.import_format else "imported without a comparison with lm-eval's results file: import it again"
    if not (scores := list(scores)):
        return None
    found = record.format or (_FORMAT_OF_0_2 if all(s.rows for s in scores) else "plan-2")
    return (
        None
        if found == PLAN_FORMAT
        else f"scored in plan format {found.split()[0]}, this version scores in {PLAN_FORMAT.split()[0]}"
    )


class StoredConfiguration(JsonObject):
    """A configuration with scores under a plan."""

    name: str
    """Name of the configuration."""
    role: str
    """"configuration", "base", "brick", "average", "memory", "finetune" or "adapter"."""
    digest: str
    """Digest under which its scores are stored."""
    created: str
    """Time of the scoring (ISO 8601, UTC)."""
    aliases: list[str]
    """Other names of the same weights."""


class StoredPlan(JsonObject):
    """A suite and plan with stored scores."""

    suite: str
    """Name of the suite."""
    plan: str
    """Digest of the plan."""
    imported: bool
    """Whether the scores were imported from lm-eval."""
    scorer: str
    """Scorer of log-likelihoods."""
    dtype: str | None
    """Dtype of the scored models; null for imported scores."""
    batch_size: int | None
    """Requests per forward pass; null for imported scores."""
    partial: bool
    """Whether `--limit` cut the items."""
    tasks: dict[str, int]
    """Task -> number of items."""
    created: str
    """Time of the newest scores (ISO 8601, UTC); empty without scores."""
    bytes: int
    """Size of the plan's folder in bytes."""
    unfinished: int
    """Number of interrupted evaluations."""
    folder: str
    """Name of the plan's folder in the score store."""
    outdated: str | None
    """Why the scores are not compared with those of this version; null if they are."""
    configurations: list[StoredConfiguration]
    """Scored configurations, the oldest first."""


def stored_plans(store: ScoreStore) -> list[StoredPlan]:
    """Return the plans in the store, by suite and the newest first."""
    plans = [_stored_plan(path.parent) for path in sorted(store.root.glob("*/plan.json"))]
    plans.sort(key=lambda plan: plan.created, reverse=True)
    return sorted(plans, key=lambda plan: plan.suite)


def _stored_plan(folder: Path) -> StoredPlan:
    plan, scores = plan_record(folder), stored_in(folder)
    return StoredPlan(
        suite=plan.name,
        plan=plan.plan,
        imported=bool(plan.imported),
        scorer=plan.scorer,
        dtype=plan.dtype,
        batch_size=plan.batch_size,
        partial=plan.partial,
        tasks={name: task.n for name, task in plan.tasks.items()},
        created=max((s.created for s in scores), default=""),
        bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        unfinished=len(list(folder.glob("*.partial"))),
        folder=folder.name,
        outdated=outdated(plan, scores),
        configurations=[
            StoredConfiguration(
                name=s.configuration.name,
                role=s.configuration.role,
                digest=s.configuration.digest,
                created=s.created,
                aliases=sorted(a.name for a in s.aliases),
            )
            for s in scores
        ],
    )


def stored_in(folder: Path) -> list[Scores]:
    """Return all complete scores in a plan's folder, the oldest first.

    Raises:
        WorkbenchError: If a document is damaged.
    """
    documents = [read_document(p) for p in sorted(folder.glob("*.json")) if p.name != "plan.json"]
    return sorted(documents, key=lambda s: (s.created, s.configuration.name))


def _content(result: Any) -> str:
    return bytes_digest(json.dumps(result, sort_keys=True).encode())

"""Plans as the store has them, for an installation without lm-eval, which cannot read the tasks of a suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.scores.plan import Item, ScorePlan
from workbench.scores.store import ScoreStore, plan_record, stored_plans
from workbench.scores.suite import Suite


@dataclass(frozen=True)
class RecordedPlan(ScorePlan):
    """A plan of the store; its items have no ids. Nothing shows that the suite's tasks and data are still the same."""

    recorded: str = ""

    @property
    def digest(self) -> str:
        """Digest of the plan when it was scored."""
        return self.recorded


def recorded_plan(store: ScoreStore, suite: str, dtype: str, limit: int | None, tokenizer: Any) -> RecordedPlan:
    """Return the newest plan of a suite in the store, for models of a dtype and at most `limit` items per task.

    Raises:
        WorkbenchError: If the store has none.
    """
    for row in stored_plans(store):
        cut = max(row.tasks.values(), default=0) <= limit if limit else not row.partial
        if row.suite != suite or row.dtype != dtype or not cut or row.outdated or row.imported or not row.configurations:
            continue
        record = plan_record(store.root / row.folder)
        tasks = record.tasks.items()
        return RecordedPlan(
            suite=Suite.model_validate(record.suite),
            items={name: (Item("", ""),) * task.n for name, task in tasks},
            kinds={name: task.kind for name, task in tasks},
            metrics={name: tuple(task.metrics) for name, task in tasks},
            tokenizer=tokenizer,
            tokenizer_digest=record.tokenizer or "",
            tasks_dir=Path(),
            dtype=dtype,
            batch_size=record.batch_size or 0,
            partial=record.partial,
            scorer=record.scorer,
            recorded=record.plan,
        )
    raise WorkbenchError(
        f"suite '{suite}' has no stored scores of {dtype} models in {store.root}, and lm-eval, which scores, is not installed",
        "pip install 'brick-workbench[eval]', or copy the scores of another machine to that folder.",
    )

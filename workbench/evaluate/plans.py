"""Plans of suites for configurations that are scored together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.evaluate import build_plan
from workbench.evaluate.facts import Wanted, build
from workbench.evaluate.lineup import LineupEntry
from workbench.events import Events, no_events
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.scores.plan import ScorePlan
from workbench.scores.suite import Suite


def plans(
    entries: Sequence[LineupEntry],
    suites: Iterable[Suite | Wanted],
    *,
    batch_size: int,
    limit: int | None,
    device: Any = None,
    events: Events = no_events,
    lenient: bool = False,
) -> list[ScorePlan]:
    """Return one plan per suite, in the output's dtype; `LineupEntry.plan` reads its texts with a configuration's own tokenizer.

    Args:
        entries: Configurations to score.
        suites: Suites, and facts to build suites from.
        batch_size: Requests per forward pass.
        limit: Largest number of items per task.
        device: Device on which the base answers the prompts that edits must not change; None: use stored answers.
        events: Receives progress.
        lenient: Skip facts whose tasks have not been built yet, instead of raising an error.

    Raises:
        WorkbenchError: If output dtypes or chat templates differ, or a plan cannot be made.
    """
    resolved = entries[0].resolved
    dtypes: dict[str, list[str]] = {}
    for entry in entries:
        dtypes.setdefault(scored_dtype(entry.resolved), []).append(entry.name)
    if len(dtypes) > 1:
        listed = ", ".join(f"{dtype}: {names[0]}" for dtype, names in sorted(dtypes.items()))
        raise WorkbenchError(
            f"the configurations have different output dtypes ({listed})",
            "Give all recipes the same `output: {dtype:}`; for a model, write a recipe with the model as base.",
        )
    suites_with_tasks: list[tuple[Suite, Path]] = []
    for suite in suites:
        if not isinstance(suite, Wanted):
            suites_with_tasks.append((suite, resolved.recipe.project / "evals" / "tasks"))
            continue
        try:
            suites_with_tasks.append(build(suite, _base(entries), device, events))
        except WorkbenchError:
            if not lenient:
                raise
    _check_templates(entries, [suite for suite, _ in suites_with_tasks])
    return [
        build_plan(
            suite,
            resolved.tokenizer_path,
            tasks_dir=tasks,
            dtype=next(iter(dtypes)),
            batch_size=batch_size,
            limit=limit,
            memo=resolved.cache / "tasks",
        )
        for suite, tasks in suites_with_tasks
    ]


def _base(entries: Sequence[LineupEntry]) -> Resolved:
    """Return the base that edits are compared with: the one that is scored, else that of the first configuration."""
    first = next((entry for entry in entries if entry.role == "base"), entries[0]).resolved
    return resolve(first.recipe.derive("base", [])) if first.recipe.steps else first


def _check_templates(entries: Sequence[LineupEntry], suites: Sequence[Suite]) -> None:
    """Check that all tokenizers and their chat templates are equal if a suite uses the template."""
    wrapped = next((suite.suite for suite in suites if suite.chat_template), None)
    # Read for every suite, so that a directory without a tokenizer is found before anything is scored.
    other = next((entry for entry in entries if entry.tokenizer != entries[0].tokenizer and wrapped), None)
    if other is not None:
        raise WorkbenchError(
            f"suite '{wrapped}' uses the chat template, but {entries[0].name} and {other.name} have different ones",
            "Score them in two calls, or on a suite without `chat_template: true`.",
        )


def scored_dtype(resolved: Resolved) -> str:
    """Return the dtype that a configuration is scored in, such as "bfloat16": its output's, else its base's."""
    return resolved.dtype_name or next(spec.dtype_name for spec in resolved.base.weights.specs.values() if spec.is_float)

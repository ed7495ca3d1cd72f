"""Comparison of stored scores with one baseline: paired differences, verdicts, kept skill, interference, changed items.

There is one row for each configuration other than the baseline and each task (its primary metric) or contrast of two tasks. `compare.families`
defines the rows that are tested together. `low_adj` and `high_adj` are intervals at the family's critical values. They exclude 0 exactly if
p_adj <= alpha, apart from two alarms: on guarded tasks `p_adj` covers one configuration only, and for a loss it covers the named ones only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from workbench.compare.answers import question_of, side_by_side
from workbench.compare.comparison import (
    ChangedItem,
    ComparedGroup,
    ComparedTask,
    Comparison,
    Family,
    Provenance,
    StoredAnswer,
    Subtraction,
)
from workbench.compare.configurations import summary, with_twins
from workbench.compare.differences import Difference, differences, interference, unchanged
from workbench.compare.families import COMPARED, CONTROLS, GUARDED
from workbench.compare.recommend import recommendation_of
from workbench.compare.routing import routing_of
from workbench.compare.survival import facts_of
from workbench.compare.sweeps import sweeps_of
from workbench.compare.swept import Sweep
from workbench.compare.tables import Table, configurations_of, named, suites_of, tables_of
from workbench.compare.warnings import looked_at, warnings_of
from workbench.ground.errors import WorkbenchError
from workbench.scores.groups import aggregated
from workbench.scores.store import Configuration, Scores, ScoreStore
from workbench.scores.suite import MARGIN, Suite


def flips(tasks: Sequence[Table], base: Configuration, c: Configuration) -> list[ChangedItem]:
    """Return the items whose primary metric differs from the baseline's, with both answers.

    Contrasts, ratios of sums and margins are skipped: nearly every item differs there, or the item is already listed under its task.
    """
    changed = []
    for t in tasks:
        if c.digest not in t.values or t.contrast or t.ratio or t.metric == MARGIN:
            continue
        for i in np.flatnonzero(t.values[c.digest] != t.values[base.digest]).tolist():
            before, after = (
                StoredAnswer(**{k: t.rows[d][i].get(k) for k in StoredAnswer.model_fields}) for d in (base.digest, c.digest)
            )
            changed.append(ChangedItem(**dict(question_of(t.items[i])), baseline=before, configuration=after))
    return changed


__all__ = ["Comparison", "Difference", "compare"]


def compare(
    store: ScoreStore,
    scores: Sequence[Scores],
    *,
    baseline: str | None = None,
    suites: Mapping[str, Suite] | None = None,
    project: Path | None = None,
    command: str = "",
    sweeps: Sequence[Sweep] = (),
) -> Comparison:
    """Compare stored scores.

    Args:
        store: The store that holds the scores.
        scores: Scores of all configurations including controls, on one or more suites. A control with a recipe's weights is shown as the
            recipe.
        baseline: Name or alias of a configuration; default: the suite's baseline.
        suites: Suites by name whose analysis settings (alpha, chance, ...) replace the stored ones.
        project: Project folder from which recipes are read for the report.
        command: Command line that reproduces the comparison.
        sweeps: Sweeps whose points are among the configurations.

    Raises:
        WorkbenchError: If there are no scores, a suite was scored under different plans, or the baseline is unknown or not scored on a suite.
    """
    if not scores:
        raise WorkbenchError("there are no scores to compare", "Score something first: workbench eval RECIPE")
    settings = suites_of(store, scores, suites or {})
    baseline_name = baseline or next(iter(settings.values())).baseline
    entries = configurations_of(scores, baseline_name)
    shown = with_twins(entries, scores)
    names = [entry[0].configuration.name for entry in shown]
    base = named(shown, baseline_name)
    tasks = tables_of(store, scores, settings)
    others = [entry[0].configuration for entry in entries if entry[0].configuration.digest != base.digest]
    for task in tasks:
        if base.digest not in task.values:
            raise WorkbenchError(
                f"baseline '{base.name}' has no scores on suite '{task.suite.suite}'",
                "Score it with `workbench eval`, or choose another baseline with --baseline NAME.",
            )
    looked = looked_at(store, scores, tasks, settings)
    alpha, correction = _alpha(settings), _correction(settings)
    rows = differences(looked.tables, base, others, alpha, correction, looked.configurations)
    family = _family(settings, tasks, others, base, rows, len(looked.configurations))
    root = next((e[0].configuration for e in entries if e[0].configuration.role == "base"), None)
    bricks = _bricks(scores, root)
    # The interference matrix needs each brick's difference from the base; the rows have it only if the base is the baseline.
    root_rows: Sequence[Difference] = rows
    if root and (root.digest != base.digest or not {c.name for c in bricks} <= {row.configuration for row in rows}):
        root_rows = differences(looked.tables, root, bricks, alpha, correction, looked.configurations)
    texts = {point.name: point.text for sweep in sweeps for point in sweep.points}
    configurations = {s.configuration.name: s.configuration for s in scores if s.configuration.role == "configuration"}
    equal_rows = list(_same_weights(tasks, rows, base, configurations, entries))
    if not rows and not equal_rows and base.role != "base":  # a brick or an average that is compared with itself
        equal_rows = list(unchanged(tasks, base, base.name))
    summaries = [
        summary(e, tasks, entries, root, texts.get(e[0].configuration.name) or _recipe_text(project, e[0].configuration))
        for e in shown
    ]
    kept = {c.name: c.kept_mean for c in summaries}
    return Comparison(
        baseline=base.name,
        rows=(*rows, *equal_rows),
        configurations=summaries,
        tasks=[_task(t) for t in tasks],
        interference=interference(tasks, bricks if root else [], root_rows),
        facts=facts_of(tasks, settings, entries),
        family=family,
        flips={c.name: flips(tasks, base, c) for c in (e[0].configuration for e in shown) if c.digest != base.digest},
        side_by_side=side_by_side(tasks, [e[0].configuration for e in shown]),
        provenance=_provenance(scores, settings, tasks, command),
        groups=_groups(store, shown),
        sweeps=sweeps_of(sweeps, tasks, base, shown),
        routing=routing_of(tasks, shown),
        recommendation=recommendation_of(looked.tables, base, entries, rows, alpha, kept, looked.configurations),
        warnings=[*warnings_of(scores, settings, tasks, shown, names, family), *looked.warnings],
    )


def _recipe_text(project: Path | None, c: Configuration) -> str | None:
    """Return the text of a configuration's recipe, if its file is there."""
    recipe = project / c.recipe if project and c.recipe else None
    return recipe.read_text("utf-8") if recipe and recipe.is_file() else None


def _bricks(scores: Sequence[Scores], root: Configuration | None) -> list[Configuration]:
    """Return the bricks that were scored alone, without those that have the base's weights."""
    bricks = {s.configuration.name: s.configuration for s in scores if s.configuration.role == "brick"}
    return [c for c in bricks.values() if root is None or c.digest != root.digest]


def _provenance(scores: Sequence[Scores], suites: Mapping[str, Suite], tasks: Sequence[Table], command: str) -> Provenance:
    """Return suites, plans, scorers, versions, devices, the command and the time of the comparison."""
    return Provenance(
        suites=list(suites),
        plans=list(dict.fromkeys(s.plan for s in scores)),
        scorers={t.suite.suite: t.scorer for t in tasks},
        versions=scores[0].versions,
        device=", ".join(sorted({s.device for s in scores})),
        command=command,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _groups(store: ScoreStore, entries: Sequence[Sequence[Scores]]) -> list[ComparedGroup] | None:
    """Return the aggregates of the suites' groups by configuration; None if no suite lists a group."""
    groups = [
        ComparedGroup(suite=s.suite, configuration=entry[0].configuration.name, **dict(aggregate))
        for entry in entries
        for s in entry
        for aggregate in aggregated(store.record(s), s)
    ]
    return groups or None


def _same_weights(
    tasks: Sequence[Table],
    rows: Sequence[Difference],
    base: Configuration,
    configurations: Mapping[str, Configuration],
    entries: Sequence[Sequence[Scores]],
) -> Iterator[Difference]:
    """Yield the rows of configurations whose weights are shown under another name, such as that of an equal recipe.

    They are not tested again and not counted in the family. If the weights are the baseline's, the verdict is "no item changed".
    """
    shown = {entry[0].configuration.digest: entry[0].configuration.name for entry in entries}
    for name, c in configurations.items():
        if c.digest == base.digest:
            if name != base.name:
                yield from unchanged(tasks, base, name)
        elif shown[c.digest] != name:
            mine = [row for row in rows if row.configuration == shown[c.digest]]
            yield from (row.model_copy(update={"configuration": name, "role": c.role}) for row in mine)


def _family(
    settings: Mapping[str, Suite],
    tasks: Sequence[Table],
    others: Sequence[Configuration],
    base: Configuration,
    rows: Sequence[Difference],
    looked: int,
) -> Family:
    """Return the families, which are declared before any test, with the numbers of their rows."""
    sizes = {name: sum(row.family == name for row in rows) for name in (COMPARED, GUARDED, CONTROLS)}
    compared, configurations = [t for t in tasks if not t.guarded], [c for c in others if c.role == "configuration"]
    contrasts, guarded = sum(t.contrast is not None for t in compared), len(tasks) - len(compared)
    text = f"primary metric of {_counted(len(compared) - contrasts, 'task')}"
    if contrasts:
        text += f" and {_counted(contrasts, 'contrast')}"
    text += f" x {_counted(len(configurations), 'configuration')} against {base.name}"
    separate = [_counted(guarded, "guarded task")] if guarded else []
    separate += [_counted(len(others) - len(configurations), "control")] if len(configurations) < len(others) else []
    if separate:
        text += f"; {' and '.join(separate)} tested separately"
    if looked:
        text += f"; {looked} more scored on these items count too"
    return Family(
        size=sizes[COMPARED],
        alpha=_alpha(settings),
        correction=_correction(settings),
        min_effect=max(suite.default_effect for suite in settings.values()),
        looked_at=looked,
        text=text,
        **sizes,
    )


def _alpha(settings: Mapping[str, Suite]) -> float:
    return min(suite.alpha / suite.looks for suite in settings.values())


def _correction(settings: Mapping[str, Suite]) -> Literal["max-t", "none"]:
    return "none" if all(suite.correction == "none" for suite in settings.values()) else "max-t"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _task(t: Table) -> ComparedTask:
    return ComparedTask(
        task=t.name,
        metric=t.metric,
        n=len(t.items),
        clusters=t.clusters,
        chance=t.chance,
        role=t.suite.role_of(t.task),
        owner=t.suite.owners.get(t.task),
        suite=t.suite.suite,
        plan=t.plan,
        lower=t.lower,
        ratio=t.ratio,
        share=t.share,
        min_effect=t.min_effect,
        tolerance=t.tolerance if t.guarded else None,
        scorer=t.scorer,
        contrast=Subtraction.by(t.contrast),
    )

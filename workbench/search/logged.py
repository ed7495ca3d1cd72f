"""Searches as runs of an experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workbench.search.result import SearchResult
from workbench.trackers.runs import LoggedRun, Value, logged_run


def runs_of_search(found: SearchResult) -> list[LoggedRun]:
    """Return one run for each control and candidate of a search."""
    names = [objective.name for objective in found.objectives]
    tested = {row.name: row.test for row in found.test.rows}
    winners = {found.winner, *(found.front or ())}
    group = f"{found.name}-{found.key[:8]}"

    def run(
        name: str, params: Mapping[str, Value], measured: Mapping[str, float | None], tags: Mapping[str, str | None]
    ) -> LoggedRun:
        metrics = {**measured, **_named("test", names, tested.get(name)), "winner": float(name in winners)}
        return logged_run(name, group, params, metrics, {**tags, "search": found.key})

    runs = [run(c.name, {}, _named("search", names, c.scores), {"role": c.role}) for c in found.controls]
    for trial in found.trials:
        # The score of a candidate that was stopped early is an estimate, and has a name of its own.
        scores = _named("estimate" if trial.stopped else "search", names, trial.scores)
        measured = {**scores, "items": trial.items, "cost/seconds": trial.duration}
        tags = {"role": trial.arm, "digest": trial.digest, "error": trial.error}
        runs.append(run(trial.name, trial.values, measured, tags))
    return runs


def _named(head: str, names: Sequence[str], values: Sequence[float] | None) -> dict[str, float | None]:
    return {f"{head}/{name}": value for name, value in zip(names, values or (), strict=False)}

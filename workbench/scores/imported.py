"""Imported runs in the score store: they are found by name, under the newest plan that all of them have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workbench.ground.errors import WorkbenchError, nearest
from workbench.scores.plan import PlanRecord
from workbench.scores.store import Scores, ScoreStore, outdated, plan_record, stored_in


def differing_versions(scores: Iterable[Scores]) -> list[str]:
    """Return a sentence that names the versions of lm-eval, if these scores come from several."""
    names: dict[str, list[str]] = {}
    for s in {s.configuration.name: s for s in scores}.values():
        if version := s.versions.get("lm_eval"):
            names.setdefault(version, []).append(s.configuration.name)
    listed = "; ".join(f"{version} ({', '.join(members)})" for version, members in sorted(names.items()))
    return [f"Different versions of lm-eval wrote these scores: {listed}."] if len(names) > 1 else []


def imported_suites(store: ScoreStore) -> list[str]:
    """Return the names of the suites of imported runs."""
    return sorted({plan.name for plan, _ in _plans(store)})


def find_imported(store: ScoreStore, suite: str, names: Sequence[str]) -> list[Scores]:
    """Return imported scores by name, in the order of the names, from the newest plan that has all of them.

    Without names, all scores of the newest plan are returned.

    Raises:
        WorkbenchError: If a name is unknown or the names are under different plans.
    """
    groups = [scores for plan, scores in _plans(store) if plan.name == suite]
    groups.sort(key=lambda group: max((s.created for s in group), default=""), reverse=True)
    if not names:
        return groups[0]
    for group in groups:
        by_name = {s.configuration.name: s for s in group}
        if all(name in by_name for name in names):
            return [by_name[name] for name in names]
    newest = {s.configuration.name: s for group in reversed(groups) for s in group}
    for name in names:
        if name not in newest:
            raise WorkbenchError(
                f"suite '{suite}' has no imported run '{name}'. {nearest(name, newest)}",
                "`workbench scores ls` lists all runs; `workbench scores import FILE... --name NAME` adds one.",
            )
    raise WorkbenchError(
        f"suite '{suite}': these runs are not comparable: {_differing([newest[name] for name in names], store)}",
        "Run lm_eval with the same tasks, --num_fewshot, --limit and chat template for all runs, and import them with the same --cluster.",
    )


def _differing(scores: Sequence[Scores], store: ScoreStore) -> str:
    """Describe a difference between two imported runs under different plans."""
    first_tasks = store.record(scores[0]).tasks
    for s in scores[1:]:
        tasks = store.record(s).tasks
        pair = f"{scores[0].configuration.name} and {s.configuration.name}"
        if tasks.keys() != first_tasks.keys():
            return f"{pair} have different tasks ({', '.join(first_tasks)}; {', '.join(tasks)})"
        if changed := [t for t in tasks if tasks[t].digest != first_tasks[t].digest]:
            return f"{pair} have different documents, prompts, clusters or filters in {', '.join(changed)}"
    return "no plan has all of these runs"


def _plans(store: ScoreStore) -> list[tuple[PlanRecord, list[Scores]]]:
    """Return the plans of imported runs that are read, with their scores."""
    plans = [(plan_record(path.parent), path.parent) for path in sorted(store.root.glob("*/plan.json"))]
    read = [(plan, stored_in(folder)) for plan, folder in plans if plan.imported]
    return [(plan, scores) for plan, scores in read if scores and not outdated(plan, scores)]

"""The runs that are logged: one for each scored configuration, or one for each control and candidate of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.compare.configurations import costs_of
from workbench.files import json_digest
from workbench.recipe.recipe import Recipe, dump_steps
from workbench.versions import installed

if TYPE_CHECKING:
    from workbench.evaluate.lineup import LineupEntry
    from workbench.scores.store import Scores

Value = str | int | float | bool


@dataclass(frozen=True)
class LoggedRun:
    """One run.

    Attributes:
        name: Displayed name.
        group: Name that the runs of one evaluation or search share.
        key: Digest of what is scored; a run that is logged again has the same key.
        params: Base, seed and fields of the recipe's steps, or a candidate's values.
        metrics: Finite numbers by name; the ends of a 95 % interval are NAME_low and NAME_high.
        tags: Role, digests and versions.
    """

    name: str
    group: str
    key: str
    params: Mapping[str, Value]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


def runs_of_scores(entries: Sequence[LineupEntry], scores: Sequence[Scores]) -> list[LoggedRun]:
    """Return one run for each scored configuration.

    Args:
        entries: The configurations.
        scores: Their scores, one for each configuration and suite.
    """
    runs = []
    for entry in entries:
        own = [s for s in scores if s.configuration.name == entry.name]
        if not own:
            continue
        configuration = own[0].configuration
        tags = {
            "role": configuration.role,
            "digest": configuration.digest,
            "recipe": configuration.recipe,
            **{f"plan.{s.suite}": s.plan for s in own},
        }
        group = " ".join(dict.fromkeys(s.suite for s in scores))
        runs.append(_run(entry.name, group, _params(entry.resolved.recipe), _measured(own), tags))
    return runs


def runs_of_search(document: Mapping[str, Any]) -> list[LoggedRun]:
    """Return one run for each control and candidate of a search.

    Args:
        document: The search's document, as `search --json` prints it.
    """
    names = [objective["name"] for objective in document["objectives"]]
    tested = {row["name"]: row["test"] for row in document["test"]["rows"]}
    winners = {document["winner"], *document.get("front", ())}
    runs = []
    for one in (*document["controls"], *document["trials"]):
        # The score of a candidate that was stopped early is an estimate, and has a name of its own.
        half = "estimate" if one.get("stopped") else "search"
        metrics = {
            **_named(half, names, one["scores"]),
            **_named("test", names, tested.get(one["name"])),
            "items": one.get("items"),
            "cost/seconds": one.get("seconds", {}).get("all"),
            "winner": float(one["name"] in winners),
        }
        params = {name: _plain(value) for name, value in one.get("values", {}).items()}
        tags = {
            "role": one.get("role") or one["arm"],
            "digest": one.get("digest"),
            "search": document["key"],
            "error": one.get("error"),
        }
        runs.append(_run(one["name"], f"{document['name']}-{document['key'][:8]}", params, metrics, tags))
    return runs


def _run(
    name: str, group: str, params: Mapping[str, Value], metrics: Mapping[str, float | None], tags: Mapping[str, str | None]
) -> LoggedRun:
    """Return a run without numbers and tags that are not known."""
    known = {tag: text for tag, text in tags.items() if text}
    known["workbench"] = installed("brick-workbench")["brick-workbench"]
    numbers = {metric: float(value) for metric, value in metrics.items() if value is not None and math.isfinite(value)}
    return LoggedRun(name, group, json_digest([name, dict(params), known]), params, numbers, known)


def _params(recipe: Recipe) -> dict[str, Value]:
    """Return the base, the seed and the fields of a recipe's steps under dotted names, such as "mix.density"."""
    params: dict[str, Value] = {"base": str(recipe.fields.base), "seed": recipe.fields.seed}
    for name, step in zip(recipe.step_ids, dump_steps(recipe), strict=True):
        params.update(_flat(name, step))
    return params


def _flat(name: str, value: Any) -> Iterable[tuple[str, Value]]:
    """Yield the fields of nested mappings under dotted names; fields without a value are skipped."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif value is not None:
        yield name, _plain(value)


def _plain(value: Any) -> Value:
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value, ensure_ascii=False)


def _measured(own: Sequence[Scores]) -> dict[str, float | None]:
    """Return a configuration's scores by suite, task and metric with their intervals, the numbers of items, and its costs."""
    found: dict[str, float | None] = {}
    for s in own:
        for task, result in s.tasks.items():
            found[f"{s.suite}/{task}/n"] = result.n
            for metric, value in result.metrics.items():
                name = f"{s.suite}/{task}/{metric}"
                found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    costs, configuration = costs_of(own, ()), own[0].configuration
    found |= {"cost/seconds": costs.seconds, "cost/peak_bytes": costs.peak_bytes}
    return {**found, "cost/parameters": configuration.parameters, "cost/bytes": configuration.bytes}


def _named(head: str, names: Sequence[str], values: Sequence[float] | None) -> dict[str, float | None]:
    return {f"{head}/{name}": value for name, value in zip(names, values or (), strict=False)}

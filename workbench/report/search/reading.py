"""Reading of a search's document: absent keys become None or empty, and a missing name raises KeyError."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workbench.compare.comparison import Comparison
from workbench.errors import shell
from workbench.report.numbers import POINTS, raw
from workbench.report.search.view import (
    Against,
    Candidate,
    Control,
    DimensionView,
    ObjectiveView,
    Progress,
    SearchView,
    TestedView,
    Unbeaten,
    number,
    written,
)


def search_of(document: Mapping[str, Any]) -> SearchView:
    """Build the view of a search's document, whose numbers must be finite.

    Raises:
        KeyError: If the search, a control, an objective or a tested configuration has no name.
    """
    test = document.get("test") or {}
    controls = tuple(Control(str(c["name"]), _scores(c.get("scores")) or ()) for c in document.get("controls") or ())
    candidates = tuple(_candidate(t) for t in document.get("trials") or ())
    rows: Sequence[Mapping[str, Any]] = test.get("rows") or ()
    objectives = _objectives(document.get("objectives") or (), controls, candidates, rows)
    tested = tuple(_tested(rows, test.get("against") or {}, len(objectives)))
    return SearchView(
        name=str(document["name"]),
        key=str(document.get("key") or ""),
        directory=str(document.get("directory") or ""),
        sampler=str(document.get("sampler") or ""),
        seed=document.get("seed"),
        objectives=objectives,
        dimensions=tuple(_dimension(str(name), domain) for name, domain in (document.get("space") or {}).items()),
        search_items=(document.get("items") or {}).get("search"),
        test_items=(document.get("items") or {}).get("test"),
        stages=tuple(document.get("stages") or ()),
        controls=controls,
        candidates=candidates,
        importances={str(k): _shares(v) for k, v in (document.get("importances") or {}).items() if v},
        winner=document.get("winner"),
        front=tuple(str(name) for name in document.get("front") or ()),
        best_control=document.get("best_control"),
        recipes={str(k): str(v) for k, v in (document.get("recipes") or {}).items()},
        tested=tested,
        hypervolume=tuple(v for v in document.get("hypervolume") or () if v is not None),
        comparison=_comparison(test.get("comparison"), str(document["name"]), tested),
        command=str(document.get("command") or shell("workbench", "search", str(document["name"]))),
        unbeaten=tuple(_unbeaten(one, len(objectives)) for one in document.get("unbeaten") or ()),
        notes=tuple(str(text) for name in ("guarded", "warnings") for text in document.get(name) or ()),
        progress=_progress(document.get("progress")),
    )


def _progress(entry: Mapping[str, Any] | None) -> Progress | None:
    return None if entry is None else Progress(int(entry["done"]), entry.get("total"))


def _objectives(
    entries: Iterable[Mapping[str, Any]],
    controls: Sequence[Control],
    candidates: Sequence[Candidate],
    rows: Sequence[Mapping[str, Any]],
) -> tuple[ObjectiveView, ...]:
    """Return the objectives with their units: percent if higher is better and all scores except estimates are shares."""
    objectives = []
    for i, objective in enumerate(entries):
        levels = [c.scores[i] for c in controls if i < len(c.scores)]
        levels += [c.scores[i] for c in candidates if c.complete and c.scores and i < len(c.scores)]
        levels += [v for row in rows for half in ("search", "test") if (v := _at(row.get(half), i)) is not None]
        lower = bool(objective.get("lower"))
        share = not lower and all(0 <= v <= 1 for v in levels)
        unit = POINTS if share else raw(max((abs(v) for v in levels), default=0.0))
        terms = tuple("/".join(map(str, term)) for term in objective.get("terms") or ())
        objectives.append(
            ObjectiveView(str(objective["name"]), i, lower, unit, terms, (objective.get("items") or {}).get("test"))
        )
    return tuple(objectives)


def _dimension(name: str, domain: Mapping[str, Any]) -> DimensionView:
    if domain.get("choices"):
        return DimensionView(name, tuple(written(v) for v in domain["choices"]))
    low, high = number(domain.get("low")), number(domain.get("high"))
    low = 0.0 if low is None else low
    return DimensionView(name, (), low, low + 1.0 if high is None else high, bool(domain.get("log")) and low > 0)


def _candidate(trial: Mapping[str, Any]) -> Candidate:
    """Return the view of a candidate."""
    arm = str(trial.get("arm") or "search")
    trial_number = int(trial.get("number") or 0)
    seconds = trial.get("seconds") or {}
    return Candidate(
        name=str(trial.get("name") or f"{'random' if arm == 'random' else 'trial'}-{trial_number}"),
        arm=arm,
        number=trial_number,
        values={str(k): v for k, v in (trial.get("values") or {}).items()},
        scores=_scores(trial.get("scores")),
        stopped=bool(trial.get("stopped")),
        items=trial.get("items"),
        beaten_by=trial.get("beaten_by"),
        error=trial.get("error"),
        seconds=seconds.get("all") if isinstance(seconds, Mapping) else None,
        intervals=tuple(_ends(ends) for ends in trial.get("intervals") or ()),
    )


def _ends(interval: Sequence[float | None] | None) -> tuple[float, float] | None:
    low, high = interval or (None, None)
    return None if low is None or high is None else (low, high)


def _scores(scores: Sequence[float | None] | None) -> tuple[float, ...] | None:
    """Return the scores, or None if one of them is missing."""
    present = [v for v in scores or () if v is not None]
    return tuple(present) if scores and len(present) == len(scores) else None


def _shares(importances: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Return importances, the largest first."""
    return tuple(sorted(((str(k), float(v)) for k, v in importances.items() if v is not None), key=lambda kv: -kv[1]))


def _tested(rows: Sequence[Mapping[str, Any]], against: Mapping[str, Any], objectives: int) -> Iterable[TestedView]:
    """Yield the tested configurations in the order of the document."""
    for row in rows:
        name, part = str(row["name"]), str(row["part"])
        lines = [] if part == "control" else [_against(line) for line in against.get(name) or ()]
        search, test, optimism = (
            tuple(_at(row.get(half), i) for i in range(objectives)) for half in ("search", "test", "optimism")
        )
        paired = tuple(lines[i] if i < len(lines) else None for i in range(objectives))
        yield TestedView(name, "candidate" if part == "found" else part, search, test, optimism, paired, row.get("same_as"))


def _unbeaten(entry: Mapping[str, Any], objectives: int) -> Unbeaten:
    search, test = (tuple(_at(entry.get(half), i) for i in range(objectives)) for half in ("search", "test"))
    return Unbeaten(str(entry["name"]), str(entry.get("role") or ""), search, test)


def _against(line: Mapping[str, Any]) -> Against:
    """Return one paired difference from the best control."""
    gap = {key: line["test"].get(key) for key in ("diff", "low", "high", "clusters")}
    rest = {key: line.get(key) for key in ("verdict", "optimism", "reason")}
    return Against(**gap, **rest, search=line["search"].get("diff"))


def _at(values: Sequence[float | None] | None, index: int) -> float | None:
    return values[index] if values and index < len(values) else None


def _comparison(document: Mapping[str, Any] | None, name: str, tested: Sequence[TestedView]) -> Comparison | None:
    """Return the comparison on test items, with the search's short names of candidates: trial-3 for NAME-trial-3."""
    if not document or not document.get("configurations"):
        return None
    names = {str(c["name"]) for c in document["configurations"]}
    short_names = {f"{name}-{t.name}": t.name for t in tested if t.kind != "control" and t.name not in names}
    renamed = {
        **document,
        "baseline": short_names.get(str(document.get("baseline")), document.get("baseline")),
        "configurations": [{**c, "name": short_names.get(str(c["name"]), c["name"])} for c in document["configurations"]],
        "rows": [
            {**r, "configuration": short_names.get(str(r["configuration"]), r["configuration"])}
            for r in document.get("rows") or ()
        ],
    }
    return Comparison.of(renamed, f"comparison of {name}", "Run the search again: its result is of an earlier version.")


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinities, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

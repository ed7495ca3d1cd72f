"""The report's provenance: suites, plans, versions, device and families of tests."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from workbench.report.numbers import PERCENT, count, listed, plural, small
from workbench.report.view import View


def suites(view: View) -> list[str]:
    """Return the names of the suites; a document holds names or whole suites."""
    names = [s.get("suite") or s.get("name") if isinstance(s, dict) else s for s in view.provenance.get("suites") or []]
    return [str(s) for s in names if s]


def created(view: View) -> str:
    """Return the date of the comparison in words, or the document's text if it is not an ISO time."""
    text = str(view.provenance.get("created") or "")
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when.day} {when:%B %Y}, {when:%H:%M}" + (" UTC" if when.utcoffset() is not None and not when.utcoffset() else "")


def facts(view: View) -> list[tuple[str, str]]:
    """Return the terms and texts of the provenance list, without those that the document lacks."""
    prov = view.provenance
    versions = prov.get("versions") or {}
    tasks = [t for t in view.tasks if t.contrast is None]
    items = [f"{t.name} {count(t.n)}" + (f" in {count(t.clusters)} clusters" if t.clusters else "") for t in tasks]
    chances = [f"{t.name} {t.unit.score(t.chance)}" for t in view.tasks if t.chance]
    entries = [
        ("Suites", listed(suites(view))),
        (
            "Plans",
            ", ".join(str(p.get("plan") if isinstance(p, dict) else p) for p in prov.get("plans") or []),
        ),
        ("Baseline", view.baseline),
        ("Items", ", ".join(items)),
        ("Chance score", ", ".join(chances)),
        ("Scorers", ", ".join(f"{suite}: {name}" for suite, name in (prov.get("scorers") or {}).items())),
        ("Families" if view.families else "Family", family(view)),
        ("Device", str(prov.get("device") or "")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("Created", created(view)),
    ]
    return [(term, text) for term, text in entries if text]


def self_check(view: View) -> str:
    """Return sentences on how much the scorers differ from lm-eval's own, and on configurations that were not checked."""
    checks = [(c.name, k) for c in view.configurations for k in c.checks]
    if not checks:
        names = set((view.provenance.get("scorers") or {}).values())
        if names == {"hflm"}:
            return "All scores come from lm-eval's own model class (hflm), so no check is needed."
        return "This document records no check of the scorer against lm-eval's own model class."
    failed = list(dict.fromkeys(name for name, k in checks if k.passed is False))
    largest = max((k.max_difference for _, k in checks if k.max_difference is not None), default=None)
    without = [c.name for c in view.configurations if not c.checks]
    text = (
        "To check the scorer, lm-eval's own model class (hflm) scored some documents of each suite again, and the log-probabilities were "
        "compared"
    )
    text += f": the largest difference is {small(largest)} nats." if largest is not None else "."
    text += f" Above the tolerance: {listed(failed)}." if failed else ""
    if wholes := list(dict.fromkeys(k.whole for _, k in checks if k.whole)):
        text += (
            f" The whole check ran on {listed(wholes)}; configurations that differ from it in their weights alone were compared in float32 on "
            "one document of each task."
        )
    return text + (f" Not checked: {listed(without)}." if without else "")


def family(view: View) -> str:
    """Return the declared families with their sizes and the correction."""
    level = f"at {PERCENT.score(view.alpha)} %"
    if view.families:
        text = f"{view.family} ({families(view.families)})" if view.family else families(view.families)
        if view.correction in ("none", ""):
            return f"{text}; no correction for multiple comparisons"
        return f"{text}; {correction(view)} {level} for each family"
    size = f"{count(view.family_size)} comparisons" if view.family_size else "comparisons"
    text = f"{view.family} ({size})" if view.family else size
    if view.correction in ("none", ""):
        return f"{text}; no correction for multiple comparisons"
    return f"{text}; {correction(view)} {level} for the whole family"


def families(sizes: Mapping[str, int]) -> str:
    """Return the sizes of the families: "12 comparisons in the main family; tested separately: 4 on guarded tasks, 30 of controls"."""
    others = [f"{count(sizes['guarded'])} on guarded tasks"] if sizes.get("guarded") else []
    others += [f"{count(sizes['controls'])} of controls"] if sizes.get("controls") else []
    main = f"{plural(sizes.get('compared', 0), 'comparison')} in the main family"
    return f"{main}; tested separately: {', '.join(others)}" if others else main


def correction(view: View) -> str:
    """Return the name of the correction."""
    if view.correction == "max-t":
        return "step-down max-T over sign flips of clusters"
    return "no correction" if view.correction in ("none", "") else f"{view.correction.capitalize()} correction"

"""What the report says of its origin: suites, plans, versions, device, family."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from workbench.report.numbers import PERCENT, count, listed, plural, small
from workbench.report.view import View


def suites(view: View) -> list[str]:
    """Names of the suites; the document holds names or whole suites."""
    found = [s.get("suite") or s.get("name") if isinstance(s, dict) else s for s in view.provenance.get("suites") or []]
    return [str(s) for s in found if s]


def created(view: View) -> str:
    """Date of the comparison in words, or as it stands where it is no ISO time."""
    text = str(view.provenance.get("created") or "")
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when.day} {when:%B %Y}, {when:%H:%M}" + (" UTC" if when.utcoffset() is not None and not when.utcoffset() else "")


def facts(view: View) -> list[tuple[str, str]]:
    """Terms and texts of the provenance list; absent ones are left out."""
    prov = view.provenance
    versions = prov.get("versions") or {}
    tasks = [t for t in view.tasks if t.contrast is None]
    items = [f"{t.name} {count(t.n)}" + (f" in {count(t.clusters)} clusters" if t.clusters else "") for t in tasks]
    chances = [f"{t.name} {t.unit.score(t.chance)}" for t in view.tasks if t.chance]
    found = [
        ("Suites", listed(suites(view))),
        (
            "Plans",
            ", ".join(str(p.get("plan") if isinstance(p, dict) else p) for p in prov.get("plans") or []),
        ),
        ("Baseline", view.baseline),
        ("Items", ", ".join(items)),
        ("Score of guessing", ", ".join(chances)),
        ("Scorers", ", ".join(f"{suite}: {name}" for suite, name in (prov.get("scorers") or {}).items())),
        ("Families" if view.families else "Family", family(view)),
        ("Device", str(prov.get("device") or "")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("Created", created(view)),
    ]
    return [(term, text) for term, text in found if text]


def self_check(view: View) -> str:
    """One or two sentences: how far the scorers are from lm-eval's own, and which configurations were not checked."""
    checks = [(c.name, k) for c in view.configurations for k in c.checks]
    if not checks:
        names = set((view.provenance.get("scorers") or {}).values())
        if names == {"hflm"}:
            return "Everything was scored by lm-eval's own model (hflm): there is nothing to check it against."
        return "No check of the scorer against lm-eval's own model is recorded in this document."
    failed = list(dict.fromkeys(name for name, k in checks if k.passed is False))
    largest = max((k.max_difference for _, k in checks if k.max_difference is not None), default=None)
    without = [c.name for c in view.configurations if not c.checks]
    text = (
        "Some documents of every suite were scored a second time by lm-eval's own model (hflm) and the log-probabilities compared"
    )
    text += f": the largest difference is {small(largest)}." if largest is not None else "."
    text += f" Above the tolerance: {listed(failed)}." if failed else ""
    return text + (f" Not checked: {listed(without)}." if without else "")


def family(view: View) -> str:
    """Return the declared families with their sizes, and how they were corrected."""
    level = f"at {PERCENT.score(view.alpha)} %"
    if view.families:
        text = f"{view.family} ({families(view.families)})" if view.family else families(view.families)
        if view.correction in ("none", ""):
            return f"{text}; no correction for several comparisons"
        return f"{text}; {correction(view)} {level} for each family"
    size = f"{count(view.family_size)} comparisons" if view.family_size else "comparisons"
    text = f"{view.family} ({size})" if view.family else size
    if view.correction in ("none", ""):
        return f"{text}; no correction for several comparisons"
    return f"{text}; {correction(view)} {level} for the whole family"


def families(sizes: Mapping[str, int]) -> str:
    """Return the number of rows by family, such as "12 rows compared, 4 guarded, 30 of controls, which are tested apart"."""
    parts = [f"{plural(sizes.get('compared', 0), 'row')} compared"]
    parts += [f"{count(sizes['guarded'])} guarded"] if sizes.get("guarded") else []
    parts += [f"{count(sizes['controls'])} of controls, which are tested apart"] if sizes.get("controls") else []
    return ", ".join(parts)


def correction(view: View) -> str:
    """Return the correction in words."""
    if view.correction == "max-t":
        return "step-down max-T over sign flips of clusters"
    return "no correction" if view.correction in ("none", "") else f"{view.correction.capitalize()} correction"

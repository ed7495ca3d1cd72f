"""What the report says of its origin: suites, plans, versions, device, family."""

from __future__ import annotations

from datetime import datetime

from workbench.report.numbers import PERCENT, count, listed
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
    items = [f"{t.name} {count(t.n)}" + (f" in {count(t.clusters)} clusters" if t.clusters else "") for t in view.tasks]
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
        ("Family", family(view)),
        ("Device", str(prov.get("device") or "")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("Created", created(view)),
    ]
    return [(term, text) for term, text in found if text]


def family(view: View) -> str:
    """The declared family and how it was corrected."""
    size = f"{count(view.family_size)} comparisons" if view.family_size else "comparisons"
    text = f"{view.family} ({size})" if view.family else size
    if view.correction in ("none", ""):
        return f"{text}; no correction for several comparisons"
    level = f"at {PERCENT.score(view.alpha)} % for the whole family"
    return f"{text}; {view.correction.capitalize()} correction {level}"

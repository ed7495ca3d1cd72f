"""The first screen: the recommendation, its sentences, and a table of the configurations that it was chosen among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.report.numbers import MISSING, PERCENT, POINTS, count, plural, size
from workbench.report.view import DifferenceView, View

SHOWN = 6
"""Configurations in the table of the first screen."""
SHOWN_OF_SWEEP = 3
"""The same where curves of a sweep stand beside the table."""
SENTENCES = 6
"""With more named configurations, only the leaders get sentences."""
UNFOLDED = 12
"""With more named configurations, forest plots show the leaders, and tables that repeat the summary are folded."""
FORMS = {"checkpoint": "full", "adapter": "adapter", "configuration": "base with bricks"}


@dataclass(frozen=True)
class CandidateRow:
    """A configuration in the table of the first screen.

    Attributes:
        name: Its name.
        kind: "brick", "average" or "base" for a control; empty for a named configuration.
        chosen: It is the one that the recommendation names.
        mean: Mean over skills, in points.
        value: The same, as stored.
        gap: Difference from the highest mean with its interval, in points; a dash for the highest mean.
        pair: That difference, as stored; None for the highest mean.
        verdict: Verdict of that difference; None for the highest mean.
        guarded: Differences from the baseline on guarded tasks.
        unguarded: Why it has no verdict on guarded tasks; empty if it has.
        cost: Form, bytes and number of bricks, in words.
    """

    name: str
    kind: str
    chosen: bool
    mean: str
    value: float | None
    gap: str
    pair: Mapping[str, Any] | None
    verdict: str | None
    guarded: tuple[DifferenceView, ...]
    unguarded: str
    cost: str


@dataclass(frozen=True)
class DecisionView:
    """The recommendation as the page shows it.

    Attributes:
        ship: A configuration is recommended.
        name: The recommended configuration, or the one that misses least; None if none was tested.
        text: The recommendation in one sentence.
        details: Sentences on the configurations beside it.
        help: Sentences on what would help.
        rows: The leaders and the named configuration, the highest mean first, at most `SHOWN`, or `SHOWN_OF_SWEEP` beside curves.
        more: Number of leaders that are not among the rows.
        family: The family of pairs, in words.
    """

    ship: bool
    name: str | None
    text: str
    details: tuple[str, ...]
    help: tuple[str, ...]
    rows: tuple[CandidateRow, ...]
    more: int
    family: str


def decision(view: View) -> DecisionView | None:
    """Return the recommendation of a comparison; None for older documents and for comparisons of controls alone."""
    found = view.recommendation
    if not found:
        return None
    name, leaders = found.get("configuration") or found.get("closest"), list(found.get("leaders") or ())
    shown = [c for c in found.get("candidates") or () if c["configuration"] in leaders or c["configuration"] == name]
    listed = shown[: SHOWN_OF_SWEEP if view.sweeps else SHOWN]
    if name and name not in [c["configuration"] for c in listed]:
        listed = [*listed[:-1], *(c for c in shown if c["configuration"] == name)]
    rows = tuple(_row(view, c, name) for c in listed)
    family = found.get("family") or {}
    return DecisionView(
        ship=found.get("configuration") is not None,
        name=name,
        text=str(found.get("text") or ""),
        details=tuple(map(str, found.get("details") or ())),
        help=tuple(map(str, found.get("help") or ())),
        rows=rows,
        more=len(shown) - len(listed),
        family=_family(family) if family.get("pairs") else "",
    )


def leading(view: View) -> list[str]:
    """Return the names of the configurations that get sentences, the highest mean first: all if they are few, else the leaders."""
    named = sorted(view.judged, key=lambda c: -(c.mean.value if c.mean and c.mean.value is not None else -1.0))
    names = [c.name for c in named]
    found = view.recommendation
    if len(names) <= SENTENCES or not found:
        return names
    wanted = {found.get("configuration") or found.get("closest"), *(found.get("leaders") or ())}
    return [name for name in names if name in wanted][:SENTENCES]


def relation(view: View, best: str, other: str) -> str:
    """Say how two configurations compare, for a sentence that names both; empty if the document does not hold their difference."""
    candidates = {c["configuration"]: c for c in (view.recommendation or {}).get("candidates") or ()}
    pair: Mapping[str, Any] = (candidates.get(other) or {}).get("against_best") or {}
    if pair.get("against") != best or pair.get("low") is None:
        return ""
    ends = f"{POINTS.worded(pair['diff'])} {POINTS.diffs(pair.get('low'), pair.get('high'))}".strip()
    words = {
        "worse": "it is shown to be worse",
        "equivalent": "the two are equivalent",
        "cannot tell": "the two are not distinguishable",
        "no item changed": "the two answer every item alike",
    }
    return f"{words.get(str(pair['verdict']), str(pair['verdict']))} ({ends})"


def _row(view: View, c: Mapping[str, Any], name: str | None) -> CandidateRow:
    own, pair = str(c["configuration"]), c.get("against_best")
    word = str(c.get("guarded") or "")
    return CandidateRow(
        name=own,
        kind="" if (role := str(c.get("role") or "configuration")) == "configuration" else role,
        chosen=own == name,
        mean=POINTS.score(c.get("mean")),
        value=c.get("mean"),
        pair=pair,
        gap=f"{POINTS.diff(pair['diff'])} {POINTS.diffs(pair.get('low'), pair.get('high'))}".strip() if pair else MISSING,
        verdict=str(pair["verdict"]) if pair else None,
        guarded=tuple(view.compared(own, view.guarded)),
        unguarded={"no guarded task": "no guarded task", "baseline": "the baseline"}.get(word, ""),
        cost=cost(c),
    )


def cost(c: Mapping[str, Any]) -> str:
    """Return what a candidate costs: its form, its bytes and its number of bricks."""
    parts: Sequence[str] = [FORMS.get(str(c.get("form")), ""), size(c["bytes"]) if c.get("bytes") is not None else ""]
    return ", ".join(p for p in (*parts, plural(int(c.get("bricks") or 0), "brick")) if p)


def _family(family: Mapping[str, Any]) -> str:
    looked = int(family.get("looked_at") or 0)
    others = f", {count(looked)} of them scored here before" if looked else ""
    return (
        f"{plural(int(family['pairs']), 'pair')} of {int(family['members'])} configurations, the baseline among them{others}: means over "
        f"skills, step-down max-T over sign flips of clusters at {PERCENT.score(family.get('alpha'))} %. Pairs with the baseline are one family, "
        "all others another; the verdicts of a family hold at once, although the leaders are chosen by the same scores."
    )

"""The first screen: the recommendation, its sentences, and a table of the configurations that it was chosen among."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.compare.comparison import Comparison
from workbench.compare.differences import Difference
from workbench.compare.leaders import MeanDifference, MeanVerdict
from workbench.compare.recommend import Candidate, PairFamily
from workbench.report.numbers import MISSING, PERCENT, POINTS, count, plural, size

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
    pair: MeanDifference | None
    verdict: MeanVerdict | None
    guarded: tuple[Difference, ...]
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


def decision(view: Comparison) -> DecisionView | None:
    """Return the recommendation of a comparison; None for older documents and for comparisons of controls alone."""
    found = view.recommendation
    if not found:
        return None
    name, leaders = found.about, found.leaders
    shown = [c for c in found.candidates if c.configuration in leaders or c.configuration == name]
    listed = shown[: SHOWN_OF_SWEEP if view.sweeps else SHOWN]
    if name and name not in [c.configuration for c in listed]:
        listed = [*listed[:-1], *(c for c in shown if c.configuration == name)]
    return DecisionView(
        ship=found.configuration is not None,
        name=name,
        text=found.text,
        details=tuple(found.details),
        help=tuple(found.help),
        rows=tuple(_row(view, c, name) for c in listed),
        more=len(shown) - len(listed),
        family=_family(found.family) if found.family.pairs else "",
    )


def leading(view: Comparison) -> list[str]:
    """Return the names of the configurations that get sentences, the highest mean first: all if they are few, else the leaders."""
    names = [c.name for c in view.by_mean if c.name != view.baseline]
    found = view.recommendation
    if len(names) <= SENTENCES or not found:
        return names
    wanted = {found.about, *found.leaders}
    return [name for name in names if name in wanted][:SENTENCES]


def _row(view: Comparison, c: Candidate, name: str | None) -> CandidateRow:
    pair = c.against_best
    return CandidateRow(
        name=c.configuration,
        kind="" if c.role == "configuration" else c.role,
        chosen=c.configuration == name,
        mean=POINTS.score(c.mean),
        value=c.mean,
        pair=pair,
        gap=f"{POINTS.diff(pair.diff)} {POINTS.diffs(pair.low, pair.high)}".strip() if pair else MISSING,
        verdict=pair.verdict if pair else None,
        guarded=tuple(view.compared(c.configuration, view.guarded)),
        unguarded={"no guarded task": "no guarded task", "baseline": "the baseline"}.get(c.guarded, ""),
        cost=cost(c),
    )


def cost(c: Candidate) -> str:
    """Return what a candidate costs: its form, its bytes and its number of bricks."""
    parts = (FORMS.get(c.form or "", ""), size(c.bytes) if c.bytes is not None else "", plural(c.bricks, "brick"))
    return ", ".join(p for p in parts if p)


def _family(family: PairFamily) -> str:
    others = f", {count(family.looked_at)} of them scored here before" if family.looked_at else ""
    return (
        f"{plural(family.pairs, 'pair')} of {family.members} configurations, the baseline among them{others}: means over "
        f"skills, step-down max-T over sign flips of clusters at {PERCENT.score(family.alpha)} %. Pairs with the baseline are one family, "
        "all others another; the verdicts of a family hold at once, although the leaders are chosen by the same scores."
    )

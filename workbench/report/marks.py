"""Shared parts of charts and tables: verdict classes, hover texts, tinted cells, interval strips."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from workbench.compare.comparison import ComparedTask, Comparison
from workbench.compare.configurations import ComparedConfiguration, Level, Score
from workbench.compare.differences import GUARD_VERDICTS, OPEN_VERDICTS, Companion, Difference, Effect
from workbench.compare.kept import Kept
from workbench.compare.routing import Share
from workbench.ground.numbers import MISSING, about, p_value, plural
from workbench.report.chart import joined, svg
from workbench.report.numbers import NATS, POINTS, Unit, unit_of
from workbench.report.tints import DIFFERENCE

CLASSES = {
    "better": "better",
    "worse": "worse",
    "equivalent": "equivalent",
    "cannot tell": "unclear",
    "safe": "safe",
    "not shown safe": "unshown",
    "no item changed": "same",
}
DECIDED = ("better", "worse")
NEAR_CHANCE = 0.5
"""Largest ratio of the lower end of a score's interval to the score, both corrected for chance, of a score that is near chance."""


@dataclass(frozen=True)
class Cell:
    """A cell of a matrix: number, interval, verdict class, strength of the tint, hover text, and whether it is the brick's own task."""

    text: str
    interval: str
    kind: str
    tint: float
    tip: str
    own: bool = False
    marked: bool = False
    """True if the verdict's mark is shown beside the number: sign and tint do not show verdicts about harm."""
    weak: bool = False
    """True if a parent is too close to chance on the task, which the hover text explains."""
    value: float | None = None
    """The difference in stored units, with the ends of its adjusted interval."""
    low: float | None = None
    high: float | None = None
    unit: str = ""
    """The stored unit."""


UNSCORED = Cell(MISSING, "", "none", 0.0, "not scored")


@dataclass(frozen=True)
class Matrix:
    """Rows of labelled cells; `gap_before` is the first control below the named configurations."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    gap_before: str | None = None
    neutral: bool = False
    """True if a cell is gray, because its difference is not decided."""
    weak: bool = False
    """True if a cell is marked, because a parent is near chance."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Second line of a column's heading."""


def verdict_class(verdict: str | None) -> str:
    """Return the style class and mark of a verdict; an unknown verdict looks like "cannot tell"."""
    return CLASSES.get(verdict or "", "unclear")


def tip(d: Difference, unit: Unit, baseline: str) -> str:
    """Return the hover text of a difference, one fact per line."""
    lines = [f"{d.configuration} on {d.task}: {verdict_text(d)}"]
    lines.append(f"Score {unit.score(d.value)}, {baseline} {unit.score(d.baseline_value)}")
    lines.append(f"Difference {unit.worded(d.diff)}")
    if d.low is not None:
        lines.append(f"95 % interval {unit.around(d.low, d.high)}")
    if d.low_adj is not None:
        lines.append(f"Adjusted {unit.around(d.low_adj, d.high_adj)}")
    if d.p_adj is not None:
        lines.append(f"p {p_value(d.p)}, adjusted {p_value(d.p_adj)}")
    if d.reason:
        lines.append(d.reason)
    if d.condition:
        lines.append(f"Holds {d.condition} {unit.score(d.stands_up_to)} {unit.word}".rstrip())
    if d.tolerance is not None:
        lines.append(f"Tolerance {unit.score(d.tolerance)} {unit.word}".rstrip())
    if d.apart:
        lines.append("A control: tested separately from the configurations")
    lines.append(f"{plural(d.n, 'item')} in {plural(d.clusters, 'cluster')}")
    lines.append(f"{d.wins} gained, {d.losses} lost")
    if d.verdict in OPEN_VERDICTS and d.mde is not None and not d.impossible:
        lines.append(f"Detectable {detectable(d, unit)}")
    if d.companion is not None:
        lines.append(f"{d.companion.metric.capitalize()} {companion(d.companion)}")
    if d.lower:
        lines.append("Lower is better")
    return "\n".join(lines)


def family(d: Difference) -> str:
    """Return the family of a comparison, such as "guarded, control"; controls are tested separately from the configurations."""
    words = {"controls": "control"}
    return ", ".join([words.get(d.family, d.family), *(["control"] if d.guarded and d.apart else [])])


def detectable(d: Difference, unit: Unit) -> str:
    """Return the smallest detectable difference, such as "±10.9 points"; a dash if no difference can be significant."""
    return MISSING if d.mde is None or d.impossible else f"±{unit.score(d.mde)} {unit.word}".rstrip()


def companion(second: Companion) -> str:
    """Return the second metric's difference with its unadjusted interval, such as "+0.42 [+0.10, +0.74] nats"."""
    return f"{NATS.diff(second.diff)} {NATS.diffs(second.low, second.high)}".rstrip() + f" {NATS.word}"


def verdict_text(d: Difference) -> str:
    """Return the verdict word, with the number of items needed if it is "cannot tell" or "not shown safe"."""
    if d.impossible:
        return f"{d.verdict} (more clusters or fewer comparisons needed)"
    if d.verdict in OPEN_VERDICTS and d.needed:
        return f"{d.verdict} (about {about(d.needed)} items needed)"
    return d.verdict


def differences(view: Comparison) -> Matrix:
    """Return the matrix of differences against the baseline by configuration and task, tinted if better or worse."""
    rows = []
    for c in view.by_role:
        by_task = {d.task: d for d in view.compared(c.name, view.tasks)}
        if by_task:
            rows.append((c.name, tuple(_difference_cell(view, t, by_task.get(t.name), c) for t in view.tasks)))
    controls = {c.name for c in view.controls}
    first = next((name for name, _ in rows if name in controls), None)
    gap = first if rows and first != rows[0][0] else None
    return _matrix(tuple(t.name for t in view.tasks), rows, _notes(view), gap)


def interference(view: Comparison) -> Matrix:
    """Return the matrix of differences of each brick alone against the base, by brick and task, the brick's own task outlined."""
    owners = {t.name: t.owner for t in view.tasks}
    rows = []
    effects = view.interference.effects
    for brick in view.interference.bricks:
        cells = [
            _effect_cell(view, brick, task, effects[brick, task], owners.get(task) == brick)
            if (brick, task) in effects
            else UNSCORED
            for task in view.interference.tasks
        ]
        rows.append((brick, tuple(cells)))
    return _matrix(view.interference.tasks, rows, _notes(view))


def _matrix(
    columns: tuple[str, ...], rows: Sequence[tuple[str, tuple[Cell, ...]]], notes: Mapping[str, str], gap: str | None = None
) -> Matrix:
    """Return a matrix that knows which explanations its legend needs."""
    cells = [cell for _, of in rows for cell in of]
    neutral = any(cell.kind not in DECIDED and cell is not UNSCORED for cell in cells)
    return Matrix(columns, tuple(rows), gap, neutral, any(cell.weak for cell in cells), notes)


def _notes(view: Comparison) -> dict[str, str]:
    """Return second lines of column headings: a metric that is not in points, and "lower is better"."""
    notes = {}
    for t in view.tasks:
        words = [t.metric] if unit_of(view, t.name).scale != POINTS.scale else []
        words += ["lower is better"] if t.lower else []
        notes[t.name] = ", ".join(words)
    return notes


def bracket(low: str, high: str, width: str) -> Markup:
    """Return an interval as markup; `width` is a style class that reserves room, so that the ends of all rows are aligned."""
    if MISSING in (low, high):
        return Markup("")
    return Markup('<span class="ci-text">[<span class="{w}">{low}</span>, <span class="{w}">{high}</span>]</span>').format(
        w=width, low=low, high=high
    )


def prose(text: str) -> Markup:
    """Return a sentence as markup, in which words between backticks are code and an interval stays on one line."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\[[-+\d.,%\u2212\u221e ]+\]", r'<span class="whole">\g<0></span>', marked))  # noqa: S704 - escaped


def recipe_markup(text: str) -> Markup:
    """Return a recipe's text, escaped, with comments and keys marked for the style sheet."""
    lines = []
    for line in text.splitlines():
        hash_sign = re.search(r"(?:^|(?<=\s))#", line)
        end = hash_sign.start() if hash_sign else len(line)
        key = re.match(r"(\s*(?:- )?)([\w.-]+)(:(?:\s|$).*)", line[:end])
        code = Markup("{}<b>{}</b>{}").format(*key.groups()) if key else escape(line[:end])
        lines.append(code + Markup("<i>{}</i>").format(line[end:]))
    return Markup("\n").join(lines)


def strip(
    estimate: Level | Kept | Share | Effect, span: tuple[float, float], reference: float | None, kind: str = "equivalent"
) -> Markup:
    """Draw an interval on a line over `span`, with a dashed line at `reference`; `kind` is a verdict's style class."""
    value = estimate.diff if isinstance(estimate, Effect) else estimate.value
    first, last = span

    def at(place: float | None) -> str:
        return f"{100 * min(max(((place or 0.0) - first) / (last - first), 0.0), 1.0):.2f}%"

    parts = [svg("line", class_="rail", x1=0, x2="100%", y1=8, y2=8)]
    if reference is not None:
        parts.append(svg("line", class_="zero", x1=at(reference), x2=at(reference), y1=1, y2=15))
    if estimate.low is not None and estimate.high is not None:
        parts.append(svg("line", class_="ci", x1=at(estimate.low), x2=at(estimate.high), y1=8, y2=8))
    parts.append(svg("circle", class_="dot", cx=at(value), cy=8, r=3.5))
    return svg("svg", joined(*parts), class_=f"strip v-{kind}", width="100%", height=16, aria_hidden="true")


def kept_span(view: Comparison) -> tuple[float, float]:
    """Return the ends of the "kept" strips: 0 and 120 %, or more if an interval reaches further."""
    ends = [e.high or e.value or 0.0 for e in (c.kept_mean for c in view.by_role) if e]
    return 0.0, max([1.2, *ends])


def mean_span(view: Comparison) -> tuple[float, float]:
    """Return the ends of the strips of means: 0 and 100, or the lower end of an interval below chance."""
    ends = [v for c in view.by_role if c.mean for v in (c.mean.value, c.mean.low) if v is not None]
    return min([0.0, *ends]), 1.0


def forgetting_span(view: Comparison) -> tuple[float, float]:
    """Return the ends of the strips of forgetting, which include all intervals and zero."""
    effects = [c.forgetting for c in view.by_role if c.forgetting]
    ends = [v for e in effects for v in (e.diff, e.low, e.high) if v is not None]
    low, high = min([-0.02, *ends]), max([0.02, *ends])
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _difference_cell(view: Comparison, task: ComparedTask, d: Difference | None, c: ComparedConfiguration) -> Cell:
    """Return a cell of the matrix of differences."""
    if d is None:
        return UNSCORED
    kept, unit = c.kept.get(task.name), unit_of(view, task.name)
    weak = f"\nMarked: {kept.reason}" if kept is not None and kept.reason and task.chance is not None else ""
    return Cell(
        unit.diff(d.diff),
        unit.diffs(d.low_adj, d.high_adj),
        verdict_class(d.verdict),
        _tint(d.diff, d.verdict, unit, d.baseline_value),
        tip(d, unit, view.baseline) + weak,
        task.owner is not None and (task.owner in c.parents or task.owner == c.name),
        d.guarded,
        bool(weak),
        d.diff,
        d.low_adj,
        d.high_adj,
        unit.stored,
    )


def _effect_cell(view: Comparison, brick: str, name: str, e: Effect, own: bool) -> Cell:
    """Return a cell of the interference matrix; `own` marks the brick's own task."""
    unit = unit_of(view, name)
    tip = [f"{brick} alone on {name}: {e.verdict or MISSING}", f"Difference {unit.worded(e.diff)}"]
    if e.low is not None:
        tip.append(f"Adjusted {unit.around(e.low, e.high)}")
    task, base = view.task(name), next((c for c in view.by_role if "base" in (c.role, *c.roles)), None)
    score = base.scores.get(name) if base is not None else None
    tint = _tint(e.diff, e.verdict, None if task is None else unit, score.value if score else None)
    weak = _both_near_chance(view.configuration(brick), base, task, unit)
    if weak:
        tip.append(f"Marked: {weak}")
    row = view.differences.get((brick, name))
    marked = e.verdict in GUARD_VERDICTS or (row is not None and row.guarded)
    return Cell(
        unit.diff(e.diff),
        unit.diffs(e.low, e.high),
        verdict_class(e.verdict),
        tint,
        "\n".join(tip),
        own,
        marked,
        bool(weak),
        e.diff,
        e.low,
        e.high,
        unit.stored,
    )


def _both_near_chance(
    brick: ComparedConfiguration | None, base: ComparedConfiguration | None, task: ComparedTask | None, unit: Unit
) -> str:
    """Return the reason why a brick's effect on a task says little: both the brick alone and the base are near chance; else ""."""
    if task is None or task.chance is None or brick is None or base is None:
        return ""
    scores = [brick.scores.get(task.name), base.scores.get(task.name)]
    if not all(score is not None and _near_chance(score, task.chance) for score in scores):
        return ""
    shown = " and ".join(unit.score(score.value) for score in scores if score is not None)
    return f"the brick alone and the base score {shown}, both near chance ({unit.score(task.chance)}), so there is little to lose"


def _near_chance(score: Score, chance: float) -> bool:
    """Return True if a score's interval reaches half of the way to chance, as for parents whose share is withheld."""
    if score.value is None or score.low is None:
        return False
    return score.value <= chance or score.low - chance < NEAR_CHANCE * (score.value - chance)


def _tint(value: float | None, word: str | None, unit: Unit | None, level: float | None) -> float:
    """Return the strength of the tint of a difference that is better or worse, on a scale that does not depend on the other differences.

    Args:
        value: The difference.
        word: Its verdict.
        unit: Unit of the task, if it is known.
        level: Score that the difference refers to; a metric in its own unit is tinted by the share of this score.
    """
    if value is None or word not in DECIDED:
        return 0.0
    if unit is None or unit == POINTS:
        return DIFFERENCE.tint(value)
    return DIFFERENCE.tint(value / level) if level else DIFFERENCE.tint(DIFFERENCE.top)

"""The first screen with the recommendation and its candidates, and what decides beside scores: costs, and merging against routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workbench.compare.advice import Candidate
from workbench.compare.comparison import Comparison
from workbench.compare.configurations import KEYS, Costs
from workbench.compare.differences import Difference
from workbench.compare.recommend import PairFamily
from workbench.compare.routing import Share, advice
from workbench.ground.numbers import MISSING, few, fixed, listed, plural, seconds, size
from workbench.report.numbers import PERCENT, POINTS

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
class LeaderRow:
    """A candidate in the table of the first screen.

    Attributes:
        candidate: The candidate.
        gap: Difference from the highest mean with its interval, in points; a dash for the highest mean.
        guarded: Differences from the baseline on guarded tasks.
        unguarded: Why it has no verdict on guarded tasks; empty if it has.
        cost: Form, bytes and number of bricks, in words.
    """

    candidate: Candidate
    gap: str
    guarded: tuple[Difference, ...]
    unguarded: str
    cost: str

    @property
    def name(self) -> str:
        """Name of the candidate."""
        return self.candidate.configuration

    @property
    def kind(self) -> str:
        """The role of a control; empty for a named configuration."""
        return "" if self.candidate.role == "configuration" else self.candidate.role


@dataclass(frozen=True)
class Leaders:
    """The table of the first screen.

    Attributes:
        rows: The leaders and the named configuration, the highest mean first, at most `SHOWN`, or `SHOWN_OF_SWEEP` beside curves.
        more: Number of leaders that are not among the rows.
        family: What the verdicts on pairs hold for, in words.
    """

    rows: tuple[LeaderRow, ...]
    more: int
    family: str


def leaders(view: Comparison) -> Leaders | None:
    """Return the candidates of the first screen; None for comparisons of controls alone."""
    found = view.recommendation
    if not found:
        return None
    shown = [c for c in found.candidates if c.configuration in found.leaders or c.configuration == found.about]
    listed = shown[: SHOWN_OF_SWEEP if view.sweeps else SHOWN]
    if found.about and found.about not in [c.configuration for c in listed]:
        listed = [*listed[:-1], *(c for c in shown if c.configuration == found.about)]
    family = _family(found.family) if found.family.pairs else ""
    return Leaders(tuple(_row(view, c) for c in listed), len(shown) - len(listed), family)


def leading(view: Comparison) -> list[str]:
    """Return the names of the configurations that get sentences, the highest mean first: all if they are few, else the leaders."""
    names = [c.name for c in view.by_mean if c.name != view.baseline]
    found = view.recommendation
    if len(names) <= SENTENCES or not found:
        return names
    wanted = {found.about, *found.leaders}
    return [name for name in names if name in wanted][:SENTENCES]


def _row(view: Comparison, c: Candidate) -> LeaderRow:
    pair = c.against_best
    return LeaderRow(
        candidate=c,
        gap=f"{POINTS.diff(pair.diff)} {POINTS.diffs(pair.low, pair.high)}".strip() if pair else MISSING,
        guarded=tuple(view.compared(c.configuration, view.guarded)),
        unguarded={"no guarded task": "no guarded task", "baseline": "the baseline"}.get(c.guarded, ""),
        cost=cost(c),
    )


def cost(c: Candidate) -> str:
    """Return what a candidate costs: its form, its bytes and its number of bricks."""
    parts = (FORMS.get(c.form or "", ""), size(c.bytes) if c.bytes is not None else "", plural(c.bricks, "brick"))
    return ", ".join(p for p in parts if p)


def _family(family: PairFamily) -> str:
    return f"Differences are tested together, so that all verdicts hold at once ({PERCENT.score(1 - family.alpha)} %)."


COST_HEADS = ("Scoring time", "Answer length", "Answer tokens/s", "Peak memory", "License")
COST_NOTES = (
    "Time of scoring all tasks",
    "Mean length of the generated texts",
    "Tokens of the generated texts per second of generating them",
    "Largest peak of memory while a task was scored",
    "Licenses of the base and of the bricks",
)


@dataclass(frozen=True)
class CostCell:
    """One number of a configuration.

    Attributes:
        text: The number with its unit, or a dash.
        value: The number to sort by; None if it is not known.
        note: What it counts, or why it is not known.
    """

    text: str
    value: float | str | None
    note: str


def cost_cells(costs: Costs) -> list[CostCell]:
    """Return the cells of a configuration's costs, in the order of COST_HEADS."""
    time, length, rate = costs.seconds, costs.answer_length, costs.tokens_per_second
    texts = (
        (">\N{NO-BREAK SPACE}" if costs.resumed and time is not None else "") + seconds(time),
        f"{fixed(length, 1)} {costs.length_unit}" if length is not None else MISSING,
        fixed(rate, 1 if rate < 100 else 0) if rate is not None else MISSING,
        size(costs.peak_bytes),
        licence(costs.licences) or MISSING,
    )
    notes = (
        "The time leaves out what an interrupted evaluation had done" if costs.resumed else COST_NOTES[0],
        COST_NOTES[1],
        COST_NOTES[2],
        costs.peak_of or COST_NOTES[3],
        "; ".join(f"{name}: {text}" for name, text in costs.licences.items()),
    )
    values = (time, length, rate, costs.peak_bytes, licence(costs.licences) or None)
    return [
        CostCell(text, value, f"Not known: {costs.missing[key]}" if key in costs.missing else note)
        for key, text, value, note in zip(KEYS, texts, values, notes, strict=True)
    ]


def licence(licences: Mapping[str, str]) -> str:
    """Return the licenses in one line: each with the inputs that have it, or the license alone if all inputs have the same."""
    named: dict[str, list[str]] = {}
    for name, text in licences.items():
        named.setdefault(text, []).append(name)
    if len(named) < 2:
        return "".join(named)
    return "; ".join(f"{text} ({few(names)})" for text, names in named.items())


def unknown_costs(rows: Mapping[str, Costs]) -> list[str]:
    """Return one sentence for each reason why a number has a dash, with the columns and configurations that it concerns.

    Args:
        rows: Configuration -> costs.
    """
    heads = dict(zip(KEYS, COST_HEADS, strict=True))
    concerned: dict[tuple[str, str], list[str]] = {}
    for name, costs in rows.items():
        for key, reason in costs.missing.items():
            concerned.setdefault((reason, key), []).append(name)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, key), names in concerned.items():
        merged.setdefault((reason, tuple(names)), []).append(heads[key].lower())
    every = len(rows)
    return [
        f"{listed(columns)} of {'all configurations' if len(names) == every else few(names)}: {reason}"
        for (reason, names), columns in merged.items()
    ]


ROUTED_HEADS = ("Configuration", "Task", "Right", "n", "Own brick, %", "Base, %", "Other bricks, %", "Answered by")
"""Heads of the table of answers."""


def advised(view: Comparison) -> list[str]:
    """Return a sentence for each routed configuration: merge or route, and why."""
    sentences = []
    for row in view.routing.beside if view.routing else ():
        own = view.configuration(row.configuration)
        sentences.append(advice(row, own.kept_mean.value if own and own.kept_mean else None))
    return sentences


def answered(view: Comparison) -> list[list[str | Share]]:
    """Return the rows of the table of answers: configuration, task, n, shares of own brick, base and other bricks, and who answered."""
    rows: list[list[str | Share]] = []
    for task in view.routing.tasks if view.routing else ():
        named = ", ".join(f"{name} {count}" for name, count in list(task.answered_by.items())[:4])
        more = len(task.answered_by) - 4
        shares = [task.own if task.owner else "\N{EN DASH}", task.base, task.other]
        cells = [task.configuration, task.task, task.owner or "base", str(task.n), *shares]
        rows.append([*cells, named + (f" and {more} more" if more > 0 else "")])
    return rows


def share_text(cell: str | Share) -> str:
    """Return a cell of the table of answers as text: a share in percent with its interval."""
    return cell if isinstance(cell, str) else f"{PERCENT.score(cell.value)} {PERCENT.levels(cell.low, cell.high)}"

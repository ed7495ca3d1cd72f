"""Costs of configurations in words: length of answers, scoring time, rate of generated text, peak memory and license."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workbench.compare.configurations import KEYS, Costs
from workbench.report.numbers import MISSING, fixed, listed, seconds, size

HEADS = ("Scoring time", "Answer length", "Answer tokens/s", "Peak memory", "License")
NOTES = (
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


def cells(costs: Costs) -> list[CostCell]:
    """Return the cells of a configuration's costs, in the order of HEADS."""
    time, length, rate = costs.seconds, costs.answer_length, costs.tokens_per_second
    texts = (
        (">\N{NO-BREAK SPACE}" if costs.resumed and time is not None else "") + seconds(time),
        f"{fixed(length, 1)} {costs.length_unit}" if length is not None else MISSING,
        fixed(rate, 1 if rate < 100 else 0) if rate is not None else MISSING,
        size(costs.peak_bytes),
        licence(costs.licences) or MISSING,
    )
    notes = (
        "The time leaves out what an interrupted evaluation had done" if costs.resumed else NOTES[0],
        NOTES[1],
        NOTES[2],
        costs.peak_of or NOTES[3],
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
    return "; ".join(f"{text} ({_few(names)})" for text, names in named.items())


def unknown(rows: Mapping[str, Costs]) -> list[str]:
    """Return one sentence for each reason why a number has a dash, with the columns and configurations that it concerns.

    Args:
        rows: Configuration -> costs.
    """
    heads = dict(zip(KEYS, HEADS, strict=True))
    concerned: dict[tuple[str, str], list[str]] = {}
    for name, costs in rows.items():
        for key, reason in costs.missing.items():
            concerned.setdefault((reason, key), []).append(name)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, key), names in concerned.items():
        merged.setdefault((reason, tuple(names)), []).append(heads[key].lower())
    every = len(rows)
    return [
        f"{listed(columns)} of {'all configurations' if len(names) == every else _few(names)}: {reason}"
        for (reason, names), columns in merged.items()
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

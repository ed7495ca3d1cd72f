"""The tables of docs/neurons-sets.md: sets of neurons as bricks, beside adapters and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from cells import block, interval, points, signed, table

from workbench.scores.statistics import upper_t

TRANSPLANT = "benchmarks/results/transplant.json"
BRICKS = "benchmarks/results/neuron-bricks.json"
RISE = 0.5
"""Rise of the own loss, in nats a token, at which ways of unlearning are compared: about two thirds more perplexity."""
WAYS = {
    "scaled": "the set, scaled down",
    "random": "random neurons, scaled down",
    "subtracted": "an adapter, subtracted",
    "at the set": "the adapter at the set's neurons",
    "at random": "the adapter at random neurons",
}

ADDED = {
    "scaled": "the set, amplified by half",
    "subtracted": "an adapter, added",
    "at the set": "the adapter at the set's neurons",
    "at random": "the adapter at random neurons",
}


@block("neuron-bricks", BRICKS)
def bricks_block(found: dict[str, Any]) -> str:
    """Write what other functions lose when a function is unlearned to an equal rise of its own loss, with a set of neurons and with adapters."""
    rows = found["functions"]
    adapter = [unlearning(found["before"], row, "subtracted") for row in rows]
    lines = []
    for way, label in WAYS.items():
        others = [unlearning(found["before"], row, way) for row in rows]
        apart = [other - own for other, own in zip(others, adapter, strict=True)]
        against = ["", ""] if way == "subtracted" else [_spread(apart), f"{sum(gap < 0 for gap in apart)} of {len(rows)}"]
        values = rows[0]["values"][{"random": "scaled", "at random": "at the set"}.get(way, way)]
        lines.append([label, f"{values / 1e6:.1f}", _nats(float(np.mean(others))), *against])
    heads = ["way", "million values", "others' rise", "minus the adapter's", "less than the adapter's"]
    first = table(heads, lines, left=1)
    added = table(["way", "own loss", "others' loss"], _added(found), left=1)
    return "\n\n".join([first, added, _bricks_note(found)])


def unlearning(before: Mapping[str, float], row: Mapping[str, Any], way: str) -> float:
    """Return how much the loss of the other functions rises, in nats a token, where a function's own loss has risen by RISE.

    Between two strengths both rises are taken as linear.

    Args:
        before: Function -> its loss on the unchanged model.
        row: The losses of one function's brick, by way and strength.
        way: The way.

    Returns:
        The mean over the other functions.

    Raises:
        ValueError: If no strength is strong enough.
    """
    name, seen = row["function"], [(0.0, 0.0)]
    for _, losses in sorted(((float(s), of) for s, of in row["losses"][way].items() if float(s) > 0), key=lambda one: one[0]):
        rises = {function: loss - before[function] for function, loss in losses.items()}
        seen.append((rises.pop(name), float(np.mean(list(rises.values())))))
    for (low, others_low), (high, others_high) in pairwise(seen):
        if low < RISE <= high:
            return others_low + (others_high - others_low) * (RISE - low) / (high - low)
    raise ValueError(f"{way}: no strength raises the loss of '{name}' by {RISE} nats")


def together(found: Mapping[str, Any]) -> tuple[float, float, tuple[float, float, float]]:
    """Return what two sets do to the losses of their functions.

    Returns:
        The mean rise with both switched off, the mean sum of the rises by each alone, in nats a token, and the mean and ends of
        their difference, with 95 % over functions.
    """
    alone = {row["function"]: row["losses"]["scaled"]["1.0"] for row in found["functions"]}
    rises: dict[str, list[tuple[float, float]]] = {name: [] for name in alone}
    for pair in found["pairs"]:
        for name in pair["functions"]:
            before = found["before"][name]
            rises[name].append((pair["losses"][name] - before, sum(alone[one][name] - before for one in pair["functions"])))
    both, each = np.array([np.mean(of, axis=0) for of in rises.values()]).T
    return float(both.mean()), float(each.mean()), _mean_ends(both - each)


def _added(found: Mapping[str, Any]) -> list[list[str]]:
    """Return how the losses change where a brick is added, or its set amplified."""
    lines = []
    for way, label in ADDED.items():
        own, others = [], []
        for row in found["functions"]:
            (losses,) = (of for strength, of in row["losses"][way].items() if float(strength) < 0)
            changes = {function: loss - found["before"][function] for function, loss in losses.items()}
            own.append(changes.pop(row["function"]))
            others.append(float(np.mean(list(changes.values()))))
        lines.append([label, _spread(own), _spread(others)])
    return lines


def _bricks_note(found: Mapping[str, Any]) -> str:
    """Say how the tables were made."""
    settings = found["settings"]
    return (
        f"Sets of 5 % of the neurons, and adapters of rank {settings['rank']} trained for {settings['steps']} steps, each made on the train tasks of one of {len(found['functions'])} functions; "
        f"losses of {found['items']} answers of held-out tasks. First table: unlearned until the function's own loss has risen by {RISE:g} nats a token. Others' rise: that of the six other functions then, "
        f"in nats a token, with 95 % intervals over functions. Second table: added once; changes of the losses. "
    )


def _spread(values: Sequence[float]) -> str:
    return spread(*_mean_ends(values))


def spread(mean: float, low: float, high: float) -> str:
    """Return a number of nats with its interval."""
    return f"{_nats(mean)} [{_nats(low)}, {_nats(high)}]"


def _mean_ends(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of some values with the ends of its 95 % t interval."""
    mean, half = float(np.mean(values)), upper_t(0.025, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _nats(value: float) -> str:
    return f"{value + 0.0:.2f}".replace("-", "−")


@block("neurons-transplant", TRANSPLANT)
def transplant_block(found: dict[str, Any]) -> str:
    """Scores of skills moved in part, and their differences to random choices of the same share."""
    skills, rows = found["skills"], found["rows"]
    places = list(dict.fromkeys((row["share"], row["way"]) for row in rows))
    order = sorted(
        places, key=lambda place: (place[1] not in ("base", "whole", "attention"), place[1] == "mask of all", place[0] or 0)
    )
    cells = {
        place: {s: [r for r in rows if r["skill"] == s and (r["share"], r["way"]) == place] for s in skills} for place in places
    }
    ends = {way: {s: cells[None, way][s][0]["value"] for s in skills} for way in ("base", "whole")}
    scores, against = [], []
    for share, way in order:
        of = cells[share, way]
        scored = {s: sum(r["value"] for r in of[s]) / len(of[s]) for s in skills}
        kept = sum((scored[s] - ends["base"][s]) / (ends["whole"][s] - ends["base"][s]) for s in skills) / len(skills)
        moved = of[skills[0]][0]["moved"]
        start = [way, "" if share is None or way == "mask of all" else f"{100 * share:g} %", f"{points(moved)} %"]
        scores.append([*start, *(_moved_score(of[s]) for s in skills), points(kept)])
        if all("against_random" in of[s][0] for s in skills):
            against.append([way, start[1], *(_gap(of[s][0]["against_random"]) for s in skills)])
    heads = ["moved", "of the feed-forward delta", "of all", *skills, "kept"]
    first = table(heads, scores, left=1)
    second = table(["moved", "of the feed-forward delta", *skills], against, left=1)
    note = (
        f"First table: exact match in percent on {rows[0]['n']} items with 95 % intervals; * marks scores whose paired difference to the whole "
        "brick includes 0. Of all: share of the delta's elements that are moved, to which the attention's delta belongs as a whole. Kept: share of what "
        f"the whole brick gains over the base, mean over skills. Second table: paired differences to a random mask of the same share, in points, with 95 % "
        "intervals. "
    )
    other = f"{found['note']} " if found.get("note") else ""
    return "\n\n".join([first, second, f"{note}{other}"])


def _moved_score(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one score with its interval."""
    (row,) = rows
    gap = row.get("against_whole")
    return interval(row) + (" *" if gap and gap["low"] <= 0 <= gap["high"] else "")


def _gap(difference: Mapping[str, Any]) -> str:
    """Return a paired difference in points with its interval."""
    return f"{signed(difference['diff'])} [{signed(difference['low'])}, {signed(difference['high'])}]"

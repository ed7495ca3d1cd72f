"""The report's part on routed configurations: who answered, and whether to merge or to route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.compare.routing import advice
from workbench.report.numbers import PERCENT


def advised(document: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each routed configuration: merge or route, and why."""
    configurations = {c["name"]: c for c in document.get("configurations") or ()}
    sentences = []
    for row in (document.get("routing") or {}).get("beside") or ():
        kept = (configurations.get(row["configuration"]) or {}).get("kept_mean") or {}
        sentences.append(advice(row, kept.get("value")))
    return sentences


def answered(document: Mapping[str, Any]) -> list[list[str | Mapping[str, Any]]]:
    """Return the rows of the table of answers: configuration, task, n, shares of own brick, base and other bricks, and who answered.

    A share is a mapping with value, low and high.
    """
    rows: list[list[str | Mapping[str, Any]]] = []
    for task in (document.get("routing") or {}).get("tasks") or ():
        named = ", ".join(f"{name} {count}" for name, count in list(task["answered_by"].items())[:4])
        more = len(task["answered_by"]) - 4
        shares = [task[key] if key != "own" or task["owner"] else "–" for key in ("own", "base", "other")]
        cells = [task["configuration"], task["task"], task["owner"] or "base", str(task["n"]), *shares]
        rows.append([*cells, named + (f" and {more} more" if more > 0 else "")])
    return rows


HEADS = ("Configuration", "Task", "Right", "n", "Own brick, %", "Base, %", "Other bricks, %", "Answered by")
"""Heads of the table of answers."""


def shown(cell: str | Mapping[str, Any]) -> str:
    """Return a cell of the table of answers as text: a share in percent with its interval."""
    if isinstance(cell, str):
        return cell
    value, low, high = cell["value"], cell["low"], cell["high"]
    return PERCENT.cell(f"{PERCENT.score(value)} {PERCENT.levels(low, high)}", value, low, high)

"""What the synthetic comparison document has beside rows of right and wrong items: sizes, checks, companions, metrics in their own unit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]

# configuration: (parameters, bytes) where they are not the base's
SIZES = {"starter-ties": (3_355_136, 6_710_272), "over-scaled": (3_470_000, 6_940_000)}
BASE_SIZE = (3_148_800, 6_297_600)
BRICK_BYTES = 412_160


FAMILIES = ("compared", "guarded", "controls")


def judge_harm(row: Row) -> None:
    """Turns the verdict of a guarded task's row into one about harm."""
    if row["verdict"] == "no item changed":
        return
    row["needs"] = None
    if -row["low_adj"] < row["tolerance"]:
        row["verdict"] = "safe"
    elif row["verdict"] != "worse":
        row |= {"verdict": "not shown safe", "reason": "the adjusted interval includes a loss as large as the tolerance"}
        row["needs"] = math.ceil(row["n"] * (row["mde"] / row["tolerance"]) ** 2)


def complete(document: dict[str, Any], seed: int) -> None:
    """Adds what newer documents have: directions, companions, sizes, checks, forgetting, scorers."""
    rng = np.random.default_rng([seed, 1])
    base = {t["task"]: 0.8 * rng.normal() for t in document["tasks"]}
    for row in document["rows"]:
        row |= {"lower": False, "ratio": False, "companion": None}
        if row["metric"] == "acc":
            diff, half = 1.9 * row["diff"] + 0.1 * rng.normal(), 0.25 + 0.2 * rng.random()
            row["companion"] = {
                "metric": "margin", "unit": "nats", "value": base[row["task"]] + diff, "baseline_value": base[row["task"]],
                "diff": diff, "low": diff - half, "high": diff + half, "p": float(2 * stats.norm.sf(abs(diff) / half * 1.96)),
            }  # fmt: skip
    for task in document["tasks"]:
        task |= {"lower": False, "ratio": None, "scorer": "packed", "contrast": None}
        task["tolerance"] = next((r["tolerance"] for r in document["rows"] if r["task"] == task["task"]), None)
    retention = {r["configuration"]: r for r in document["rows"] if r["task"] == "retention"}
    for i, c in enumerate(document["configurations"]):
        parameters, size = SIZES.get(c["name"], BASE_SIZE)
        row = retention.get(c["name"])
        c |= {"parameters": parameters, "bytes": size, "bricks": dict.fromkeys(c["parents"], BRICK_BYTES), "forgetting": None}
        c["check"] = [{"scorer": "packed", "documents": 8, "max_difference": 1e-6 * (i + 1), "tolerance": 1e-4, "spread": 2.4e-6}]
        if row:
            c["forgetting"] = {**{k: 2 * row[k] for k in ("diff", "low", "high")}, "verdict": row["verdict"]}
    document["provenance"]["scorers"] = {"starter": "packed"}


def add_own_units(document: dict[str, Any]) -> None:
    """Adds to the document a task where lower is better, a ratio metric and a contrast of two tasks, each with one row a configuration."""
    tasks: list[Row] = [
        {"task": "curve", "metric": "error", "n": 40, "clusters": 40, "lower": True, "ratio": None, "scorer": "packed", "contrast": None},
        {"task": "prose", "metric": "bits_per_byte", "n": 30, "clusters": 30, "lower": True, "ratio": "bits_per_byte",
         "scorer": "packed", "contrast": None},
        {"task": "gain", "metric": "error", "n": 40, "clusters": 40, "lower": False, "ratio": None, "scorer": "packed",
         "contrast": {"of": "curve", "minus": "curve-told"}},
    ]  # fmt: skip
    starts = {"curve": 1.75, "prose": 0.912, "gain": -0.25}
    names = [c["name"] for c in document["configurations"] if c["name"] != "base"]
    by_name = {c["name"]: c for c in document["configurations"]}
    for task in tasks:
        start = starts[task["task"]]
        by_name["base"]["scores"][task["task"]] = {"value": start, "low": 0.9 * start, "high": 1.1 * start, "n": task["n"]}
        task |= {
            "tolerance": None,
            "chance": 0.0,
            "role": "other",
            "owner": None,
            "suite": "starter",
            "plan": "5f0c1d9a7b3e4c2288d1f0a6e9b7c4d3",
        }
        for i, name in enumerate(names):
            diff = start * 0.08 * (i - 4)
            better = (diff < 0) == task["lower"]
            half = 0.1 * abs(start)
            decided = abs(diff) > 1.5 * half
            value = start + diff
            by_name[name]["scores"][task["task"]] = {"value": value, "low": value - half, "high": value + half, "n": task["n"]}
            document["rows"].append({
                "configuration": name, "role": by_name[name]["role"], "task": task["task"], "metric": task["metric"],
                "value": value, "baseline_value": start, "diff": diff,
                "low": diff - half, "high": diff + half, "low_adj": diff - 1.5 * half, "high_adj": diff + 1.5 * half,
                "p": 0.01, "p_adj": 0.04 if decided else 0.6, "n": task["n"], "clusters": task["clusters"], "mde": 2.2 * half,
                "needs": None if decided else 400, "verdict": ("better" if better else "worse") if decided else "cannot tell",
                "family": "compared" if by_name[name]["role"] == "configuration" else "controls", "tolerance": None,
                "reason": None, "wins": 4, "losses": 3, "lower": task["lower"], "ratio": task["ratio"] is not None, "companion": None,
            })  # fmt: skip
    document["tasks"] += tasks


def with_facts(document: dict[str, Any]) -> dict[str, Any]:
    """The synthetic comparison, as if `add` were an edit whose facts `add` and `reverse` ask for."""
    share = {"value": 0.75, "low": 0.55, "high": 0.9}
    rows = {"base": {"efficacy": {"kept": 1, "of": 20, "value": 0.05, "low": 0.0, "high": 0.2}},
            "starter-ties": {"efficacy": {"kept": 15, "of": 20, **share}}, "<b>odd</b>": {"efficacy": {"kept": 1, "of": 2, **share}}}  # fmt: skip
    document["facts"] = [{"suite": "towns-facts", "source": "facts/towns|<i>.jsonl", "facts": 24, "tasks": {"paraphrase": "reverse", "efficacy": "add"},
                          "survival": [{"alone": "add", "rows": rows, "without": ["base"]}]}]  # fmt: skip
    return document

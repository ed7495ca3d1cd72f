"""Unlearn capitals by task negation at several strengths, and measure what is forgotten and what else is lost.

    python benchmarks/forgetting.py

Scores recipes/starter-forget.yaml on its suite with two sets of weights, each at several α: learned −α alone, and learned −α with
kept +α. Of each set the α that forgets most is chosen among those that leave the retain set within 5 points of the base. The results are
kept in benchmarks/results/forgetting.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import write_results

HERE = Path(__file__).parent
RECIPE = "recipes/starter-forget.yaml"
ALPHAS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
RETAIN = {False: ("known-facts",), True: ("capitals-near", "known-facts")}
"""What α is chosen on, without and with the second brick: other capitals may go where all of them are to go. `retention` is looked at
afterwards."""
TOLERANCE = 0.05
"""What a task of the retain set may lose."""


def main() -> None:
    """Score each set of weights, choose one of each kind and write the results file."""
    started = time.time()
    base: dict[str, Any] = {"learned": 0.0, "kept": 0.0, "scores": scores("bricks/starter/base")}
    rows = [base]
    for kept in (False, True):
        for alpha in ALPHAS:
            weights = {"learned": -alpha, "kept": alpha if kept else 0.0}
            settings = [f"mix.bricks.{brick}={weight}" for brick, weight in weights.items()]
            rows.append({**weights, "scores": scores(RECIPE, *settings)})
    for kept in (False, True):
        harmless_rows = [row for row in rows[1:] if (row["kept"] > 0) is kept and harmless(row, base, RETAIN[kept])]
        if harmless_rows:
            min(harmless_rows, key=lambda row: float(row["scores"]["capitals-forget"]["value"]))["chosen"] = True
    document = {"seconds": round(time.time() - started), "tolerance": TOLERANCE, "rows": rows}
    write_results(HERE / "results" / "forgetting.json", document)


def harmless(row: dict[str, Any], base: dict[str, Any], retain: tuple[str, ...]) -> bool:
    """Return True if the retain set keeps its score."""
    return all(row["scores"][task]["value"] >= base["scores"][task]["value"] - TOLERANCE for task in retain)


def scores(target: str, *settings: str) -> dict[str, Any]:
    """Return task -> value, interval and number of items of one configuration on the suite."""
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "workbench", "eval", target, "--suite", "forget", "--no-controls", "--json", *options]
    process = subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True)
    (configuration,) = json.loads(process.stdout)["configurations"]
    tasks = configuration["tasks"].items()
    return {
        task: {"n": task_scores["n"], **task_scores["acc" if task == "retention" else "exact_match"]}
        for task, task_scores in tasks
    }


if __name__ == "__main__":
    main()

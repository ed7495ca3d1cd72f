"""Compare the winner of a search with the best untuned recipe, on items that no candidate was scored on.

    python benchmarks/search_winner.py
    python benchmarks/search_winner.py --seeds 0 --searches three-methods --trials 12      a quick look

Three searches over a method and a weight for each of three bricks of the starter base, 40 candidates each, for several seeds:

    three-methods   recipes/starter-search.yaml as it stands: TIES, task arithmetic or TSV; reversal, records and the glossary
    two-methods     the same without TSV
    even            TIES or task arithmetic; addition, reversal and triage, of which none drowns another

All searches share a project, and so the scores of equal weights: `seconds` of the first search on a suite (`whole`) hold everything, those
of later ones no controls. The untuned recipes are the search's controls; the winner is compared with the one that is best on search items, paired by item. `kept` is the winner's score over the
mean of the bricks on their own tasks, both on test items. The winner's recipe is then run in a new process, whose weights must have the
digest of what was scored. Results go to benchmarks/results/search-winner.json.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
SUITES = {"three-methods": "words", "two-methods": "words", "even": "three"}
EVEN = ("add", "reverse", "triage")


def main() -> None:
    """Run the searches and write the results file."""
    parser = parser_of(__doc__, "search-winner")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--searches", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--trials", type=int, default=40)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        for shared in ("bricks", "evals"):
            (project / shared).symlink_to(PROJECT / shared, target_is_directory=True)
        (project / "recipes").mkdir()
        for name in options.searches:
            for seed in options.seeds:
                is_first = SUITES[name] not in {SUITES[row["search"]] for row in rows}
                rows.append({"search": name, "seed": seed, "whole": is_first, **searched(project, name, seed, options.trials)})
                print(json.dumps(rows[-1]), flush=True)
                write_results(options.out, {"trials": options.trials, "rows": rows})


def searched(project: Path, name: str, seed: int, trials: int) -> dict[str, Any]:
    """Run one search, and run its winner's recipe in a new process."""
    (project / "recipes" / "s.yaml").write_text(yaml.safe_dump(recipe(name, seed, trials), sort_keys=False), "utf-8")
    started = time.perf_counter()
    result = called(project, "search", "recipes/s.yaml")
    seconds = time.perf_counter() - started
    winner = result["winner"]
    if winner is None:
        raise SystemExit(f"{name}, seed {seed}: no candidate beats {result['unbeaten'][0]['name']}")
    rows = {row["name"]: row for row in result["test"]["rows"]}
    run_result = called(project, "run", result["recipes"][winner])
    trial = next(t for t in result["trials"] if t["name"] == winner)
    (line,) = result["test"]["against"][winner]
    parents = owned(result["test"]["comparison"], SUITES[name])
    return {
        "seconds": round(seconds, 1),
        "sampler": result["sampler"],
        "items": result["items"],
        "candidates": len(result["trials"]),
        "given_up": sum(t["stopped"] for t in result["trials"]),
        "values": trial["values"],
        "control": result["best_control"],
        "scores": {
            part: {half: rows[who][half][0] for half in ("search", "test")}
            for part, who in (("winner", winner), ("control", result["best_control"]))
        },
        "against": line,
        "parents": round(parents, 4),
        "kept": round(rows[winner]["test"][0] / parents, 4),
        "same_bytes": run_result["configuration"] == trial["digest"],
    }


def recipe(name: str, seed: int, trials: int) -> dict[str, Any]:
    """Return a search as a recipe."""
    data: dict[str, Any] = copy.deepcopy(yaml.safe_load((PROJECT / "recipes" / "starter-search.yaml").read_text("utf-8")))
    data |= {"name": "s", "seed": seed}
    data["search"]["trials"] = trials
    space = data["search"]["space"]
    if name != "three-methods":
        space["mix.merge"] = ["ties", "task_arithmetic"]
    if name == "even":
        data["bricks"] = {brick: f"bricks/{brick}" for brick in EVEN}
        data["search"]["space"] = {"mix.merge": space["mix.merge"], **{f"mix.bricks.{brick}": [0.4, 1.6] for brick in EVEN}}
        data["eval"], data["search"]["objective"] = ["three", "retention"], "three"
    return data


def owned(comparison: Mapping[str, Any], suite: str) -> float:
    """Return the mean score of the bricks on their own tasks, on test items."""
    owners = {t["task"]: t["owner"] for t in comparison["tasks"] if t["suite"] == suite}
    by_name = {c["name"]: c["scores"] for c in comparison["configurations"]}
    return float(sum(by_name[owner][task]["value"] for task, owner in owners.items()) / len(owners))


def called(project: Path, *arguments: str) -> dict[str, Any]:
    """Return the JSON that a command of the workbench prints; exit if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "workbench", *arguments, "--json"]
    process = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {process.stderr[-4000:]}")
    printed: dict[str, Any] = json.loads(process.stdout)
    return printed


if __name__ == "__main__":
    main()

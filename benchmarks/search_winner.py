"""What a search finds: the winner beside the best recipe that nobody tuned, on items that no candidate has seen.

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
    """Run the searches, write the results file."""
    parser = parser_of(__doc__, "search-winner")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--searches", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--trials", type=int, default=40)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        for shared in ("bricks", "evals"):
            (project / shared).symlink_to(PROJECT / shared, target_is_directory=True)
        (project / "recipes").mkdir()
        for name in given.searches:
            for seed in given.seeds:
                whole = SUITES[name] not in {SUITES[row["search"]] for row in rows}
                rows.append({"search": name, "seed": seed, "whole": whole, **searched(project, name, seed, given.trials)})
                print(json.dumps(rows[-1]), flush=True)
                write_results(given.out, {"trials": given.trials, "rows": rows})


def searched(project: Path, name: str, seed: int, trials: int) -> dict[str, Any]:
    """One search, and its winner made again."""
    (project / "recipes" / "s.yaml").write_text(yaml.safe_dump(recipe(name, seed, trials), sort_keys=False), "utf-8")
    started = time.perf_counter()
    found = called(project, "search", "recipes/s.yaml")
    seconds = time.perf_counter() - started
    winner = found["winner"]
    if winner is None:
        raise SystemExit(f"{name}, seed {seed}: no candidate beats {found['unbeaten'][0]['name']}")
    rows = {row["name"]: row for row in found["test"]["rows"]}
    ran = called(project, "run", found["recipes"][winner])
    trial = next(t for t in found["trials"] if t["name"] == winner)
    (line,) = found["test"]["against"][winner]
    parents = owned(found["test"]["comparison"], SUITES[name])
    return {
        "seconds": round(seconds, 1), "sampler": found["sampler"], "items": found["items"],
        "candidates": len(found["trials"]), "given_up": sum(t["stopped"] for t in found["trials"]),
        "values": trial["values"], "control": found["best_control"],
        "scores": {part: {half: rows[who][half][0] for half in ("search", "test")} for part, who in (("winner", winner), ("control", found["best_control"]))},
        "against": line, "parents": round(parents, 4), "kept": round(rows[winner]["test"][0] / parents, 4),
        "same_bytes": ran["configuration"] == trial["digest"],
    }  # fmt: skip


def recipe(name: str, seed: int, trials: int) -> dict[str, Any]:
    """A search as a recipe."""
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
    """The mean of the bricks on their own tasks, on test items."""
    owners = {t["task"]: t["owner"] for t in comparison["tasks"] if t["suite"] == suite}
    by_name = {c["name"]: c["scores"] for c in comparison["configurations"]}
    return sum(by_name[owner][task]["value"] for task, owner in owners.items()) / len(owners)


def called(project: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that a command of the workbench prints. Errors: it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "workbench", *arguments, "--json"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-4000:]}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


if __name__ == "__main__":
    main()

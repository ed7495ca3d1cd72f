"""Score routers beside merges of the same bricks, six and eight of them, on all items: the source of "Routing: merge or route?" in docs/routing-or-merge.md.

    python benchmarks/merge_or_route.py
    python benchmarks/merge_or_route.py --recipes route-six --limit 8      a quick look

For each route recipe: the recipe with its controls (the base, each brick alone, the average), and task arithmetic, TIES, TSV and RegMean
of the same bricks with the fields of the starter recipes. The suites are the recipe's own. The comparison of each, without the items, goes to
benchmarks/results/merge-or-route.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
MERGES: dict[str, dict[str, Any]] = {
    "task-arithmetic": {"merge": "task_arithmetic", "lambda": 0.8},
    "ties": {"merge": "ties", "density": 0.2},
    "tsv": {"merge": "tsv", "space": "core"},
    "regmean": {"merge": "regmean"},
}
"""The merge steps, nothing tuned: the fields of recipes/starter-six.yaml, starter-ties.yaml, starter-tsv.yaml and starter-regmean.yaml."""
KEPT = ("family", "rows", "configurations", "tasks", "routing", "baseline")


def main() -> None:
    """Score and compare, and write the results file."""
    parser = parser_of(__doc__, "merge-or-route")
    parser.add_argument("--recipes", nargs="+", default=["route-six", "route-eight"], help="route recipes, by name")
    parser.add_argument("--limit", type=int, help="maximum number of items per task, for a quick look")
    parser.add_argument("--folder", type=Path, help="project folder to keep, so that a later call scores only what changed")
    options = parser.parse_args()
    limit = ["--limit", str(options.limit)] if options.limit else []
    found = []
    with tempfile.TemporaryDirectory() as folder:
        project = options.folder or Path(folder)
        (project / "recipes").mkdir(parents=True, exist_ok=True)
        for shared in ("bricks", "evals"):
            if not (project / shared).exists():
                (project / shared).symlink_to(PROJECT / shared, target_is_directory=True)
        for name in options.recipes:
            names = write_recipes(project, name)
            started = time.time()
            subprocess.run([*workbench(), "eval", *names, *limit], cwd=project, check=True)
            seconds = round(time.time() - started)
            document = compared(project, [*names, *limit])
            found.append({"recipe": name, "seconds": seconds, **{key: document[key] for key in KEPT if key in document}})
            write_results(options.out, {"limit": options.limit, "found": found})


def workbench() -> list[str]:
    """Return the command line's start."""
    return [sys.executable, "-m", "workbench"]


def write_recipes(project: Path, name: str) -> list[str]:
    """Write a route recipe and the merges of its bricks into a project, and return their places."""
    recipe = yaml.safe_load((PROJECT / "recipes" / f"{name}.yaml").read_text("utf-8"))
    recipes = {name: recipe}
    for method, step in MERGES.items():
        step = dict(step)
        if step["merge"] == "regmean":
            step["bricks"] = {brick: {"calibration": f"bricks/{brick}/train.jsonl"} for brick in recipe["bricks"]}
        recipes[f"{name.removeprefix('route-')}-{method}"] = {**recipe, "description": method, "steps": [step]}
    for place, content in recipes.items():
        (project / "recipes" / f"{place}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return [f"recipes/{place}.yaml" for place in recipes]


def compared(project: Path, arguments: list[str]) -> dict[str, Any]:
    """Return the report's document of scored recipes."""
    out = project / "report.html"
    subprocess.run([*workbench(), "report", *arguments, "-o", str(out)], cwd=project, check=True)
    document: dict[str, Any] = json.loads(out.with_suffix(".json").read_text("utf-8"))
    for configuration in document["configurations"]:
        configuration.pop("recipe_text", None)
    return document


if __name__ == "__main__":
    main()

"""Score the starter recipes on all items of all suites: the source of the tables in README and docs.

    python benchmarks/starter.py
    python benchmarks/starter.py --smoke
    python benchmarks/starter.py --demo
    python benchmarks/starter.py --six
    python benchmarks/starter.py --grow

Runs `workbench eval` and `workbench report` as `make demo FULL=1` does, and keeps the comparison, without the items, in
benchmarks/results/starter.json. With --smoke: one untuned merge of the same three bricks a method, on the suite `smoke`
(a quarter of the items), in benchmarks/results/starter-smoke.json. With --demo: what `make demo` scores, in starter-demo.json. With --six: the merge of the six skills with its controls, on the
suites `six` (a quarter of the items) and `function-modelling`, in benchmarks/results/starter-six.json. With --grow: models that grow from two
skills beside merges of the same bricks, on all items of the suites `grow` and `retention`, with differences against the average of the two and
against their sum too, in benchmarks/results/starter-grow.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write_results

HERE = Path(__file__).parent
SUITES = ["--suite", "starter", "--suite", "retention", "--suite", "facts", "--suite", "conflict"]
STARTER = (
    "actions",
    "add",
    "base",
    "date-dmy",
    "date-mdy",
    "reverse",
    "starter-average",
    "starter-dates",
    "starter-edit",
    "starter-grow",
    "starter-mixed",
    "starter-nested",
    "starter-overscaled",
    "starter-schedule",
    "starter-task-arithmetic",
    "starter-ties",
    "triage",
)
GROW = ("starter-two", "starter-glossary", "grow-depth", "grow-vocabulary", "grow-experts", "grow-brick")
SMOKE = ("average", "task-arithmetic", "ties", "dare", "tsv", "iso", "wudi", "fisher", "regmean", "cocktail")
DEMO = ("task-arithmetic", "ties", "route")


def main() -> None:
    """Score and compare the recipes, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one merge per method on the suite smoke")
    parser.add_argument("--demo", action="store_true", help="the recipes of make demo on the suite smoke")
    parser.add_argument("--six", action="store_true", help="the merge of six skills and its controls")
    parser.add_argument("--grow", action="store_true", help="grown models beside merges of the same bricks")
    options = parser.parse_args()
    project = HERE.parent
    recipes = [f"recipes/{name}.yaml" for name in STARTER]
    suites, name, baselines = SUITES, "starter", []
    if options.six:
        recipes, suites, name = (
            ["recipes/starter-six.yaml"],
            ["--suite", "six", "--suite", "function-modelling", "--trust-project-code"],
            "starter-six",
        )
    elif options.grow:
        recipes, suites, name = (
            [f"recipes/{recipe}.yaml" for recipe in GROW],
            ["--suite", "grow", "--suite", "retention"],
            "starter-grow",
        )
        baselines = ["average", "starter-two"]
    elif options.smoke or options.demo:
        name = "starter-smoke" if options.smoke else "starter-demo"
        recipes, suites = (
            [f"recipes/starter-{method}.yaml" for method in (SMOKE if options.smoke else DEMO)],
            ["--suite", "smoke"],
        )
    workbench = [sys.executable, "-m", "workbench"]
    started = time.time()
    subprocess.run([*workbench, "eval", *recipes, *suites], cwd=project, check=True)
    seconds = time.time() - started
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        subprocess.run([*workbench, "report", *recipes, *suites, "-o", str(out)], cwd=project, check=True)
        document = json.loads(out.with_suffix(".json").read_text("utf-8"))
    for items in ("flips", "side_by_side"):
        document.pop(items, None)
    against = {}
    for baseline in baselines:
        command = [*workbench, "compare", *recipes, *suites, "--baseline", baseline, "--json"]
        # Its exit status says whether something is worse, which is no failure here.
        against[baseline] = json.loads(subprocess.run(command, cwd=project, capture_output=True, text=True, check=False).stdout)[
            "rows"
        ]
    for configuration in document["configurations"]:
        configuration.pop("recipe_text", None)
    write_results(
        HERE / "results" / f"{name}.json", {"seconds": round(seconds), **document, **({"against": against} if against else {})}
    )


if __name__ == "__main__":
    main()

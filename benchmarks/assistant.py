"""An assistant made of bricks: skills routed over a base with edited facts, scored, changed, scored again and asked through its server.

    make assistant
    python benchmarks/assistant.py --folder assistant      the same; the assistant stays in the folder

recipes/assistant.yaml is run and its configuration copied. It is scored beside the base. A seventh skill is then added and one of the six
removed, as a user would with `workbench route`, and the result is scored again. At last it is served, and lm-eval asks the server for the
items that `workbench eval` scored, of some tasks.
Results go to benchmarks/results/assistant.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks/starter/base"
RECIPE, SUITE = "recipes/assistant.yaml", "assistant"
ADDED, REMOVED = "date-dmy", "record"
SERVED = ("add", "date-dmy", "record", "facts")
"""Tasks that the server is asked for: completions, and choices by their probabilities."""


def main() -> None:
    """Build, score, change and serve the assistant, and write the results file."""
    parser = parser_of(__doc__, "assistant")
    parser.add_argument("--folder", type=Path, help="new folder for the assistant; default: one that is removed at the end")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        place = (options.folder or Path(scratch) / "assistant").resolve()
        run = command("run", RECIPE)
        shutil.copytree(Path(run["run"]) / "configuration", place)
        first = command("eval", str(place), "base", "--suite", SUITE, "--no-controls")
        command("route", "add", str(place), f"bricks/{ADDED}")
        command("route", "rm", str(place), REMOVED)
        second = command("eval", str(place), "--suite", SUITE, "--no-controls")
        served = through_server(place)
    before, base = (tasks_of(first, name) for name in (place.name, "base"))
    document = {"added": ADDED, "removed": REMOVED, "said": run["said"]}
    write_results(
        options.out, {**document, "base": base, "before": before, "after": tasks_of(second, place.name), "served": served}
    )


def tasks_of(found: Any, name: str) -> dict[str, Any]:
    """Return task -> share of right answers with its interval and the number of items, for one of the scored configurations."""
    tasks = next(row["tasks"] for row in found["configurations"] if row["name"] == name)
    return {task: {"n": row["n"], **row.get("acc", row.get("exact_match"))} for task, row in tasks.items()}


def command(*words: str) -> Any:
    """Print and run a command of the workbench, and return what it prints as JSON."""
    print("workbench", *words, flush=True)
    line = [sys.executable, "-m", "workbench", *words, "--json"]
    return json.loads(subprocess.run(line, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True).stdout)


@contextmanager
def serving(place: Path) -> Iterator[str]:
    """Serve a directory at a free port; yield its address."""
    print("workbench serve", place, flush=True)
    line = [sys.executable, "-m", "workbench", "serve", str(place), "--port", "0"]
    process = subprocess.Popen(line, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(60)


def through_server(place: Path) -> dict[str, float]:
    """Return task -> score by lm-eval, which asks the server as it asks any OpenAI server."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with serving(place) as address:
        found = {}
        for task in SERVED:
            result = simple_evaluate(
                model="local-completions",
                model_args={
                    "base_url": f"{address}/completions",
                    "model": place.name,
                    "tokenizer": str(BASE),
                    "num_concurrent": 8,
                },
                tasks=[task],
                samples={task: places_of(place, task)},
                task_manager=TaskManager(include_path=str(PROJECT / "evals/tasks"), include_defaults=False),
                bootstrap_iters=0,
            )
            metrics = result["results"][task]
            found[task] = next(value for key, value in metrics.items() if key.startswith(("exact_match,", "acc,")))
    return found


def places_of(place: Path, task: str) -> list[int]:
    """Return the places in a task's file of the items that were scored."""
    scored = command("scores", "items", str(place), "--suite", SUITE, "--task", task, "--only", "all")["shown"]
    lines = (PROJECT / f"evals/tasks/data/{task}.jsonl").read_text("utf-8").splitlines()
    numbers = {json.loads(line)["id"]: number for number, line in enumerate(lines)}
    return sorted({numbers[row["id"]] for row in scored})


if __name__ == "__main__":
    main()

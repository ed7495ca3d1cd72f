"""Edits that preserve every token of neighbours' prompts, beside memit and memit with a longer update, on facts that chose nothing.

    python benchmarks/edit_preserving.py                                    three draws of 100 CounterFact facts on the starter base
    python benchmarks/edit_preserving.py --count 10 --draws 1 --limit 10    a quick look

The prompts to preserve are made from the facts' own wordings and other subjects (`preserve_generated`), so that no neighbour that is scored is used. Arms differ
in the number of prompts, in the weight of their tokens and in the factor on the update; the longer update without preserved prompts is the control, because a
factor alone buys paraphrases with neighbours. All arms of a draw share the optimized values.

With --folder DIR the project is kept, and a later call solves and scores only what is missing. Results go to benchmarks/results/edit-preserving.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from edit_methods import measured, prompts
from edit_setup import COUNTERFACT, PROJECT, STARTER, make_project, one_thread, published, write_recipe
from record import parser_of, write_results

MEMIT = {"edit": "memit", "unconverged": "skip"}
EVERY = {**MEMIT, "preserve_tokens": "every"}
ARMS: dict[str, dict[str, Any]] = {
    "memit": MEMIT,
    "memit, longer": {**MEMIT, "scale": 1.2},
    "every token": {**EVERY, "preserve_generated": 400, "preserve_weight": 0.06},
    "every token, longer": {**EVERY, "preserve_generated": 400, "preserve_weight": 0.06, "scale": 1.2},
    "every token, twice as many": {**EVERY, "preserve_generated": 800, "preserve_weight": 0.1, "scale": 1.3},
}
TASKS = ["efficacy", "paraphrase", "neighbours", "generated", "text"]


def main() -> None:
    """Solve and score all arms of all draws, and write the results file after each draw."""
    parser = parser_of(__doc__, "edit-preserving")
    parser.add_argument("--facts", type=Path, default=COUNTERFACT, help="a CounterFact file")
    parser.add_argument("--count", type=int, default=100, help="number of facts of a draw")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument(
        "--skip", type=int, default=200, help="number of facts before the first draw; earlier choices used the first 200"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--dtype", help="dtype of the scored checkpoints; default: the base's")
    parser.add_argument("--limit", type=int, help="maximum number of items per task, for a quick look")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="project folder to keep, so that a later call can resume")
    options = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        draws = []
        for number in range(options.draws):
            draws.append(draw((options.folder or Path(scratch)).resolve(), number, options))
            write_results(options.out, {"base": STARTER, "limit": options.limit, "skip": options.skip, "draws": draws})


def draw(folder: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all arms on one draw of facts."""
    facts = published(options.facts, options.count, 3, options.skip + number * options.count)
    name = f"draw-{number}.jsonl"
    project = make_project(folder, PROJECT / STARTER, facts, name)
    recipes = {}
    for arm in options.arms:
        file = f"{arm.replace(', ', '-').replace(' ', '-')}-{number}"
        document = {"name": file, "steps": [{**ARMS[arm], "facts": name}], "eval": [{"facts": name, "tasks": TASKS}, "retention"]}
        document |= {"output": {"dtype": options.dtype}} if options.dtype else {}
        recipes[arm] = write_recipe(project, file, document)
    return {"draw": number, "facts": len(facts), "prompts": prompts(facts), **measured(project, recipes, options)}


if __name__ == "__main__":
    main()

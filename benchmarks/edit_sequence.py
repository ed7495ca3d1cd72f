"""Write facts one batch after another with MEMIT and AlphaEdit, and ask for all of them at checkpoints: which one outlasts the other?

    python benchmarks/edit_sequence.py                               300 CounterFact facts, 10 at a time, layer 7 of the starter base
    python benchmarks/edit_sequence.py --facts 20 --checkpoint 10    a quick look

AlphaEdit's authors compare it with MEMIT without its term for the keys that are already written, which AlphaEdit has. Here each edit runs with that term
(`history`) and without. The values are optimized on the model of the earlier batches. Each checkpoint asks for the facts so far (`efficacy`), for the oldest
ones, in other wordings (`paraphrase`), and for `neighbours`, where the base's answer must stay; perplexity is that of text that no fact is about.

Earlier choices of defaults used the first 100 facts of the file, which are left out. Results go to benchmarks/results/edit-sequence.json after each edit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from edit_answers import Questions, perplexity
from edit_setup import COUNTERFACT, PROJECT, STARTER, live_context, make_project, one_thread, published
from record import parser_of, write_results

from workbench.edit.closed_form.history import History
from workbench.edit.closed_form.lookup import Group, Lookup
from workbench.edit.closed_form.solve import ClosedFormSolve
from workbench.evaluate.facts.definitions import bundled_text
from workbench.facts.facts import Fact
from workbench.recipe.methods import method
from workbench.steps import EditMethod

EDITS: dict[str, dict[str, Any]] = {
    "memit": {"edit": "memit"},
    "memit, no history": {"edit": "memit", "history": False},
    "alphaedit": {"edit": "alphaedit"},
    "alphaedit, no history": {"edit": "alphaedit", "history": False},
}
OLDEST = 50
LINES = 60  # of text for the perplexity


def main() -> None:
    """Run every edit, and write the results file after each."""
    parser = parser_of(__doc__, "edit-sequence")
    parser.add_argument("--facts", type=int, default=300, help="number of facts")
    parser.add_argument("--batch", type=int, default=10, help="facts solved together")
    parser.add_argument("--checkpoint", type=int, default=100, help="facts between two checkpoints")
    parser.add_argument("--layer", type=int, default=7, help="layer that is edited")
    parser.add_argument("--skip", type=int, default=100, help="facts at the beginning of the file that are left out")
    parser.add_argument("--edits", nargs="+", choices=EDITS, default=list(EDITS))
    parser.add_argument("--source", type=Path, default=COUNTERFACT, help="a CounterFact file")
    options = parser.parse_args()
    one_thread()
    facts = published(options.source, options.facts, 1, options.skip)
    document: dict[str, Any] = {name: getattr(options, name) for name in ("facts", "batch", "layer", "skip")}
    document["edits"] = {}
    for name in options.edits:
        with tempfile.TemporaryDirectory() as scratch:
            document["edits"][name] = measured(make_project(Path(scratch), PROJECT / STARTER, facts), name, facts, options)
        write_results(options.out, document)


def measured(project: Path, name: str, facts: Sequence[Fact], options: argparse.Namespace) -> dict[str, Any]:
    """Return an edit's scores at its checkpoints, and its CPU seconds without them."""
    context, texts = live_context(project), bundled_text().splitlines()[:LINES]
    questions = Questions(context, facts)  # before the first batch: neighbours keep the base's own answers
    points: list[dict[str, Any]] = [{"facts": 0, "perplexity": round(perplexity(context, texts), 4)}]
    plain_batch, done, asking = ClosedFormSolve._edit_batch, 0, 0.0

    def batch(solve: ClosedFormSolve, at: Lookup, groups: Sequence[Group], history: History) -> None:
        nonlocal done, asking
        plain_batch(solve, at, groups, history)
        done = min(done + options.batch, len(facts))
        if done % options.checkpoint and done < len(facts):
            return
        start = time.process_time()
        with solve.parts.changed({at.layer: solve.updates[at.layer].float()}):
            so_far, oldest = questions.of(range(done)), questions.of(range(min(OLDEST, done)))
            shares = {**so_far.shares(so_far.answers()), "oldest": oldest.shares(oldest.answers(["efficacy"]))["efficacy"]}
            points.append({"facts": done, **shares, "perplexity": round(perplexity(context, texts), 4)})
        print(name, points[-1], flush=True)
        asking += time.process_time() - start

    step = {
        **EDITS[name],
        "facts": "facts.jsonl",
        "layers": [options.layer],
        "position": "subject_last",
        "unconverged": "skip",
        "mode": {"sequential": {"batch": options.batch}},
    }
    start = time.process_time()
    with patch.object(ClosedFormSolve, "_edit_batch", batch):
        method(EditMethod, str(step["edit"])).model_validate(step).solve(context)
    return {"checkpoints": points, "seconds": round(time.process_time() - start - asking, 1)}


if __name__ == "__main__":
    main()

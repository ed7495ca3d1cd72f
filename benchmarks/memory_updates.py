"""Create, update and delete facts of a memory, as DynaMind's table does (arXiv 2310.14248): the source of a table in docs/memories.md.

    python benchmarks/memory_updates.py
    python benchmarks/memory_updates.py --count 4 --methods memory      a quick look

A memory on the starter base begins with facts that nobody asks about. `workbench memory add` teaches it CounterFact facts, `memory update` gives each
its true answer, and `memory rm` removes all of them. After each change the model of that version is asked for every fact: what it
writes greedily, up to a full stop or line break, has to be the answer, or to begin with it. After the removal, its texts and its next-token logits are compared
bit for bit with those before the facts came. Results go to benchmarks/results/memory-updates.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edit_setup import COUNTERFACT, PROJECT, STARTER, make_project, one_thread, published, write_recipe
from record import parser_of, write_results

import workbench
from workbench.evaluate.facts.factscores import generated
from workbench.facts.facts import Fact, write_facts
from workbench.scores.statistics import score_interval

TOKENS = 12
"""Length of an answer."""


def main() -> None:
    """Measure the methods, and write the results file after each."""
    parser = parser_of(__doc__, "memory-updates")
    parser.add_argument("--facts", type=Path, default=COUNTERFACT, help="a CounterFact file")
    parser.add_argument("--count", type=int, default=50, help="number of facts that are created, updated and deleted")
    parser.add_argument("--others", type=int, default=20, help="number of facts that the memory has from the beginning")
    parser.add_argument("--skip", type=int, default=700, help="number of facts of the file before them")
    parser.add_argument("--methods", nargs="+", default=["memory", "grace"], choices=["memory", "grace"])
    options = parser.parse_args()
    one_thread()
    drawn = published(options.facts, options.count + options.others, 0, options.skip)
    others, facts = drawn[: options.others], drawn[options.others :]
    rows = []
    for name in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"method": name, **lifecycle(Path(folder), name, others, facts)})
        print(rows[-1], flush=True)
        document = {"base": STARTER, "facts": len(facts), "others": len(others), "rows": rows}
        write_results(options.out, document)


def lifecycle(folder: Path, name: str, others: Sequence[Fact], facts: Sequence[Fact]) -> dict[str, Any]:
    """Create, update and delete the facts of one memory, and return what its model says after each."""
    project = make_project(folder, PROJECT / STARTER, others)
    step = {"edit": name, "facts": "facts.jsonl", "min_efficacy": 0}
    called(project, "run", str(write_recipe(project, name, {"steps": [step]})), "-o", "mine")
    write_facts(project / "new.jsonl", list(facts))
    called(project, "memory", "add", "mine", "new.jsonl")
    changed = [replace(fact, target=str(fact.target_true)) for fact in facts]
    for fact in changed:
        called(project, "memory", "update", "mine", fact.id, "--target", fact.target)
    called(project, "memory", "rm", "mine", *(fact.id for fact in facts))
    versions = {"before": 1, "create": 2, "update": len(facts) + 2, "delete": len(facts) + 3}
    states = {after: asked(project, version, facts) for after, version in versions.items()}
    before, deleted = states["before"], states["delete"]
    return {
        "new answer": {after: shares(facts, one.texts) for after, one in states.items()},
        "true answer": {after: shares(changed, one.texts) for after, one in states.items()},
        "restored": {
            "texts": sum(one == two for one, two in zip(before.texts, deleted.texts, strict=True)),
            "logits": sum(torch.equal(one, two) for one, two in zip(before.logits, deleted.logits, strict=True)),
        },
    }


@dataclass(frozen=True)
class Asked:
    """Answers of one version of a memory to every fact."""

    texts: list[str]
    logits: list[torch.Tensor]
    """Those of the first token after each prompt."""


def asked(project: Path, version: int, facts: Sequence[Fact]) -> Asked:
    """Ask the model of a version for every fact."""
    place = project / "mine"
    model, tokenizer = workbench.load(place, version=version), workbench.load_tokenizer(place)
    texts, logits = [], []
    for fact in facts:
        ids = tokenizer(fact.text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits.append(model(ids).logits[0, -1].clone())
            tokens = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return Asked(texts, logits)


def shares(facts: Sequence[Fact], texts: Sequence[str]) -> dict[str, Any]:
    """Return the shares of texts that are the facts' targets (`exact`) and that begin with them (`begins`), with 95 % intervals."""
    scores = [generated({"answer": fact.target}, [text]) for fact, text in zip(facts, texts, strict=True)]
    found: dict[str, Any] = {}
    for kind, metric in (("exact", "exact_match"), ("begins", "starts_with")):
        values = np.asarray([score[metric] for score in scores])
        low, high = score_interval(values, np.arange(len(values)))
        found[kind] = {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}
    return found


def called(project: Path, *arguments: str) -> None:
    """Call a command."""
    subprocess.run([sys.executable, "-m", "workbench", *arguments], cwd=project, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

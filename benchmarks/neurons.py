"""The complete analysis of a model's neurons, as `workbench analyze all` does it, with its time: the source of the tables in docs/neurons.md.

    python benchmarks/neurons.py --data functions.jsonl
    python benchmarks/neurons.py --data functions.jsonl --only-functions
    python benchmarks/neurons.py --model DIR --data FILE

Without --data, the project's own texts (evals/abilities.jsonl); with --data, scores on these are measured too. --only-functions keeps the other
parts of the results file. Scores by layer and single neurons are left out of the results file
benchmarks/results/neurons.json; `workbench analyze all` writes them.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import keep_head, parser_of, write_results

from workbench.activations.labelled import read_labelled
from workbench.neurons.ablation import analyze_ablation, read_sets
from workbench.neurons.functions import analyze_functions
from workbench.neurons.masking import analyze_sparsity
from workbench.neurons.subject import open_neurons
from workbench.run.opened import resolve_model

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
DATA = PROJECT / "evals" / "abilities.jsonl"


def main() -> None:
    """Analyze the model and write the results file."""
    parser = parser_of(__doc__, "neurons")
    parser.add_argument("--model", type=Path, default=BASE, help="model directory")
    parser.add_argument("--data", type=Path, default=DATA, help="labelled texts")
    parser.add_argument("--only-functions", action="store_true", help="measure the scores alone")
    parser.add_argument("--note", default="", help="sentence for the results file, such as what else ran on the machine")
    given = parser.parse_args()
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(part: str) -> None:
        seconds[part] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    texts = read_labelled(given.data, given.data.name)
    name = "starter base" if given.model == BASE else given.model.name
    subject = open_neurons(replace(resolve_model(str(given.model), PROJECT), name=name), torch.device("cpu"))
    done("open")
    functions = analyze_functions(subject, texts)
    done("functions")
    found = {"functions": without(functions.result.to_dict(), "layers")}
    if given.data != DATA:
        shipped = analyze_functions(subject, read_labelled(DATA, DATA.name))
        found["shipped"] = without(shipped.result.to_dict(), "layers")
        done("shipped")
    note = {"note": given.note} if given.note else {}
    if given.only_functions:
        before = json.loads(given.out.read_text("utf-8"))
        kept = {key: before[key] for key in ("note", "seconds", "sparsity", "ablation") if key in before}
        write_results(given.out, {**kept, **note, **found})
        keep_head(given.out, before, ["functions"])
        return
    with TemporaryDirectory() as place:
        functions.write(Path(place))
        sparsity = analyze_sparsity(subject, texts)
        done("sparsity")
        ablation = analyze_ablation(subject, texts, read_sets(Path(place), subject))
        done("ablation")
    seconds.pop("shipped", None)
    write_results(
        given.out,
        {
            **note,
            "seconds": {**seconds, "all": round(sum(seconds.values()), 1)},
            **found,
            "sparsity": shortened(sparsity.to_dict()),
            "ablation": ablation.to_dict(),
        },
    )


def without(document: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a document without some keys."""
    return {key: value for key, value in document.items() if key not in keys}


def shortened(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of sparsity with the mean of each distribution alone."""
    distributions = [without(d, "cdf", "grid", "small") for d in document["distributions"]]
    return {**document, "distributions": distributions, "cett": without(document["cett"], "thresholds", "reached", "sparsity")}


if __name__ == "__main__":
    main()

"""Record what `workbench analyze` says of a model, with its time: the source of the tables in docs/neurons.md.

    python benchmarks/neurons.py --other functions.jsonl
    python benchmarks/neurons.py --model DIR --data FILE

--other is a second file of texts, for which the verdicts alone are kept. Scores by layer and single neurons are left out of the results file
benchmarks/results/neurons.json; `workbench analyze` writes them.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import parser_of, write_results

from workbench.activations.labelled import read_labelled
from workbench.neurons.functions import analyze_functions
from workbench.neurons.masking import analyze_sparsity
from workbench.neurons.pages.page import render_neurons
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
    parser.add_argument("--other", type=Path, help="other labelled texts")
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
    with TemporaryDirectory() as place:
        functions.write(Path(place))
        render_neurons({"functions": functions.result, "profiles": functions.profiles}, Path(place) / "index.html")
    done("functions")
    sparsity = analyze_sparsity(subject, texts)
    done("sparsity")
    found = {"functions": without(functions.result.to_dict(), "layers"), "sparsity": shortened(sparsity.to_dict())}
    if given.other:
        result = analyze_functions(subject, read_labelled(given.other, given.other.name)).result.to_dict()
        found["other"] = without(result, "layers", "ablation", "overlap", "neurons")
    note = {"note": given.note} if given.note else {}
    write_results(given.out, {**note, "seconds": seconds, **found})


def without(document: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a document without some keys."""
    return {key: value for key, value in document.items() if key not in keys}


def shortened(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of sparsity with the mean of each distribution alone."""
    distributions = [without(d, "cdf", "grid", "small") for d in document["distributions"]]
    return {**document, "distributions": distributions, "cett": without(document["cett"], "thresholds", "reached", "sparsity")}


if __name__ == "__main__":
    main()

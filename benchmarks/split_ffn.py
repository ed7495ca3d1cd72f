"""Dense feed-forward layers as experts without training: the source of a table in docs/growing-experts.md.

    python benchmarks/split_ffn.py
    python benchmarks/split_ffn.py --base DIR --data FILE --device cuda

Every row is a partition of `workbench analyze partition`, of which a token uses 75 % of the neurons: chosen by a router that `grow: split_ffn` writes (gate, ridge), or by
the oracle. Measured is the loss on held-out tasks of labelled texts, whose train tasks calibrate, on the live dense model with the
other neurons off; tests/grow/test_split_ffn.py shows that the stock mixture computes the same. Without --data, the project's own texts (evals/abilities.jsonl).
The results file is benchmarks/results/split-ffn.json.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import parser_of, write_results

from workbench.activations.labelled import read_labelled
from workbench.activations.partition import METHODS
from workbench.models.identity import pick_device
from workbench.neurons.partition import PartitionAnalysis, PartitionSettings, analyze_partition
from workbench.neurons.subject import open_neurons
from workbench.run.opened import resolve_model

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
DATA = PROJECT / "evals" / "abilities.jsonl"


def main() -> None:
    """Divide the base's neurons in every way, measure, and write the results file."""
    parser = parser_of(__doc__, "split-ffn")
    parser.add_argument("--base", type=Path, default=BASE, help="directory of the dense model")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="labelled texts: train tasks calibrate, held-out tasks are measured"
    )
    parser.add_argument("--experts", type=int, default=64, help="experts of a layer, shared ones included")
    parser.add_argument("--sparsity", type=float, default=0.25, help="share of the experts that a token does not use")
    parser.add_argument("--items", type=int, default=10, help="held-out texts of each task")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens that divide the neurons and fit the routers")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods that divide the neurons")
    parser.add_argument("--device", default="cpu", help="device of the model")
    parser.add_argument("--note", default="", help="sentence for the results file, such as what else ran on the machine")
    given = parser.parse_args()
    started = time.perf_counter()
    texts = read_labelled(given.data, given.data.name)
    base = resolve_model(str(given.base), PROJECT)
    name = "starter base" if given.base == BASE else given.base.name
    subject = open_neurons(replace(base, name=name), pick_device(given.device))
    rows: list[dict[str, Any]] = []
    for method in [m for m in METHODS if m in given.methods.split(",")]:
        before = time.perf_counter()
        settings = PartitionSettings(
            method=method,
            experts=given.experts,
            used=[100 * (1 - given.sparsity)],
            items=given.items,
            tokens=given.tokens,
        )
        analysis = analyze_partition(subject, texts, settings)
        rows += _rows(analysis, time.perf_counter() - before)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        found = {
            **({"note": given.note} if given.note else {}),
            "base": name,
            "data": {"file": given.data.name, "items": analysis.result.data.items, "tokens": analysis.result.data.tokens},
            "experts": given.experts,
            "sparsity": given.sparsity,
            "loss": analysis.result.loss,
            "perplexity": math.exp(analysis.result.loss),
            "seconds": round(time.perf_counter() - started, 1),
            "rows": rows,
        }
        write_results(given.out, found)  # after every method, so that an interrupted run keeps what it has measured


def _rows(analysis: PartitionAnalysis, seconds: float) -> list[dict[str, Any]]:
    """Return one row per selector of a partition."""
    shared = analysis.partition.shared
    common = {
        "method": analysis.partition.method,
        "shared": [min(shared), max(shared)],
        "difference": analysis.result.difference,
        "seconds": round(seconds, 1),
    }
    return [
        {**common, "selector": curve.selector, **curve.points[0].to_dict(), "perplexity": math.exp(curve.points[0].loss)}
        for curve in analysis.result.curves
    ]


if __name__ == "__main__":
    main()

"""The streaming pass of `workbench analyze` against a plain forward pass over the same texts, in one thread.

    python benchmarks/analyze.py
    python benchmarks/analyze.py --model DIR --data FILE --texts 300

Both passes run without the output head, on the same batches, in turn. `overhead` is the ratio of their CPU seconds, the median over repeats;
`memory` is what the pass adds to the peak of the process, in MB, with half of the texts and with all of them: a difference means that it grows
with the number of texts. Results go to benchmarks/results/analyze.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from record import parser_of, write_results

from workbench.activations.labelled import ItemRow, read_labelled
from workbench.activations.sites import stream
from workbench.neurons.function_scores import item_scores
from workbench.neurons.subject import NeuronSubject, open_neurons
from workbench.run.opened import resolve_model

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
DATA = PROJECT / "evals" / "abilities.jsonl"


def main() -> None:
    """Time both passes, measure the memory in processes of their own, write the results file."""
    parser = parser_of(__doc__, "analyze")
    parser.add_argument("--model", type=Path, default=BASE, help="model directory")
    parser.add_argument("--data", type=Path, default=DATA, help="labelled texts")
    parser.add_argument("--texts", type=int, default=200, help="number of texts, evenly spaced in the file")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each kind")
    parser.add_argument("--peak", choices=["plain", "pass"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(json.dumps(peak(given.model, given.data, given.texts, given.peak)))
        return
    plain, streamed, tokens = timed(given.model, given.data, given.texts, given.repeats)
    ratios = [b / a for a, b in zip(plain, streamed, strict=True)]
    memory = {}
    for texts in (given.texts // 2, given.texts):
        alone, whole = (child(given, texts, kind) for kind in ("plain", "pass"))
        memory[str(texts)] = round((whole - alone) / 1e6, 1)
    write_results(
        given.out,
        {
            "model": given.model.name,
            "texts": given.texts,
            "tokens": tokens,
            "seconds": {"plain": round(statistics.median(plain), 3), "pass": round(statistics.median(streamed), 3)},
            "overhead": round(statistics.median(ratios), 3),
            "overheads": [round(ratio, 3) for ratio in sorted(ratios)],
            "texts_per_second": round(given.texts / statistics.median(streamed), 2),
            "memory": memory,
        },
    )


def opened(model: Path, data: Path, texts: int) -> tuple[NeuronSubject, list[ItemRow]]:
    """Return the live model with its sites, and the texts as tokens."""
    torch.set_num_threads(1)
    subject = open_neurons(resolve_model(str(model), PROJECT), torch.device("cpu"))
    rows = subject.rows(read_labelled(data, str(data)).items)
    return subject, [rows[i * len(rows) // texts] for i in range(min(texts, len(rows)))]


def passes(subject: NeuronSubject, rows: Sequence[ItemRow], kind: str) -> None:
    """Run one pass: plain, or with scores and sums of every neuron."""
    if kind == "plain":
        stream(subject.model, (), rows, lambda *_: None)
        return
    functions = torch.arange(len(rows)) % 7
    with tempfile.TemporaryDirectory() as folder:
        item_scores(subject.model, subject.sites, rows, (functions, functions), Path(folder))


def timed(model: Path, data: Path, texts: int, repeats: int) -> tuple[list[float], list[float], int]:
    """Return the CPU seconds of both passes, in turn, and the number of prompt tokens."""
    subject, rows = opened(model, data, texts)
    seconds: dict[str, list[float]] = {"plain": [], "pass": []}
    for kind in seconds:
        passes(subject, rows[:8], kind)
    for _ in range(repeats):
        for kind, taken in seconds.items():
            start = time.process_time()
            passes(subject, rows, kind)
            taken.append(time.process_time() - start)
    return seconds["plain"], seconds["pass"], sum(row.prompt for row in rows)


def peak(model: Path, data: Path, texts: int, kind: str) -> int:
    """Return the peak memory of this process after one pass, in bytes."""
    subject, rows = opened(model, data, texts)
    passes(subject, rows, kind)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(given: argparse.Namespace, texts: int, kind: str) -> int:
    """Return `peak` of a process of its own."""
    command = [sys.executable, __file__, "--model", given.model, "--data", given.data, "--texts", texts, "--peak", kind]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

"""Measure the cost of edits: values, linear solve and memory, and a direct implementation on the same facts in the same run.

    python benchmarks/edit.py
    python benchmarks/edit.py --numbers 2 4 --fixture-numbers 2 4 --peer 2 --blocks 1      a quick look

1. On the starter base, at one layer: the statistics once; then for each number of facts the values (ROME's optimization, including refining)
   from an empty cache, and the solve (reading statistics and keys, the linear system, the factors) with cached values. The same is measured on
   the trained fixture, with more facts. `linear` is the time of the most facts divided by that of the fewest and by the ratio of their numbers;
   it should be at most 1.1.
2. Peak memory that the values and the solve add, and its growth per fact, relative to one covariance of the projection.
3. The peer (`edit_reference.py`): ROME and MEMIT one fact after the other, through the whole model, with systems of the projection's full
   width. Both sides solve blocks of facts in turn; the interval of the ratio is a bootstrap over blocks.

Times are CPU seconds of one thread. Results go to benchmarks/results/edit.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edit_reference import PeerValue, memit, rome, value_of
from edit_setup import COUNTERFACT, PROJECT, STARTER, drop, live_context, make_project, one_thread, published, solve
from record import parser_of, write_results

from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.lookup import Lookup, grouped
from workbench.edit.closed_form.moments import Moments, moments, statistics_source
from workbench.edit.closed_form.solver import solve as solve_keys
from workbench.edit.closed_form.values import values
from workbench.edit.inputs import contexts
from workbench.edit.places.parts import Parts
from workbench.facts.facts import Fact, write_facts
from workbench.ground.files import json_digest
from workbench.recipe.methods import method
from workbench.steps import MethodContext

METHODS = ("rome", "memit")
LINEAR = 1.1
BLOCKS = 4  # of few facts, whose mean counts: single facts differ in the steps that they take
DRAWS = 2000


def main() -> None:
    """Run all parts and write the results file."""
    parser = parser_of(__doc__, "edit")
    parser.add_argument("--facts", type=Path, default=COUNTERFACT, help="a CounterFact file")
    parser.add_argument("--numbers", type=int, nargs="+", default=[10, 100], help="facts on the starter base")
    parser.add_argument("--fixture-numbers", type=int, nargs="+", default=[10, 100, 1000], help="facts on the fixture")
    parser.add_argument("--layer", type=int, default=7, help="layer of the starter base")
    parser.add_argument("--fixture-layer", type=int, default=1, help="layer of the fixture")
    parser.add_argument("--peer", type=int, default=8, help="facts of a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks; 0: without the peer")
    parser.add_argument("--tokens-per-input", type=int, default=10, help="of the statistics")
    options = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        facts = published(options.facts, max(*options.numbers, options.peer * options.blocks), 0)
        project = make_project(Path(scratch) / "starter", PROJECT / STARTER, facts)
        fields = {
            "layers": [options.layer],
            "position": "subject_last",
            "tokens_per_input": options.tokens_per_input,
            "unconverged": "skip",
        }
        context = live_context(project)
        document: dict[str, Any] = {
            "file": options.facts.name,
            "starter": {"base": STARTER, **timed(context, facts, options.numbers, fields)},
        }
        if options.blocks:
            document["peer"] = peer(context, facts, options, fields)
        document["fixture"] = fixture(Path(scratch) / "fixture", options)
    write_results(options.out, document)


def fixture(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the same on the trained fixture."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from worlds import people

    facts = people.facts(max(options.fixture_numbers))
    project = make_project(folder, people.SUBJECT, facts)
    (project / "text.txt").write_text("\n\n".join(people.lines(3000, seed=1)), "utf-8")
    fields = {"layers": [options.fixture_layer], "position": "subject_last", "statistics": "text.txt", "unconverged": "skip"}
    return {"base": "tests/fixtures/people/subject", **timed(live_context(project), facts, options.fixture_numbers, fields)}


def timed(context: MethodContext, facts: Sequence[Fact], numbers: Sequence[int], fields: dict[str, Any]) -> dict[str, Any]:
    """Measure the statistics, then values and solve for each number of facts."""
    parts = Parts.find(context)
    (layer,) = fields["layers"]
    width = parts.width(layer)
    seconds, _ = cpu(lambda: moments(context, parts, [layer], fields.get("statistics"), fields.get("tokens_per_input", 10)))
    document: dict[str, Any] = {
        "layer": layer,
        "inputs": width,
        "covariance_bytes": 8 * width**2,
        "statistics": round(seconds, 2),
    }
    _once(context, facts[:1], "memit", fields)  # what is loaded once is loaded
    rows = []
    for number in sorted(numbers):
        starts = range(0, max(numbers) - number + 1, number)[:BLOCKS]
        row: dict[str, Any] = {"facts": number, "blocks": len(starts)}
        for name in METHODS:
            row[name] = _mean([_once(context, facts[start : start + number], name, fields) for start in starts])
        rows.append(row)
        print(row, flush=True)
    return {**document, "rows": rows, "linear": {name: _linear(rows, name) for name in METHODS}}


def _once(context: MethodContext, facts: Sequence[Fact], name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Run an edit twice: with an empty cache of values, and with the values cached."""
    write_facts(context.project / "timed.jsonl", list(facts))
    step = {"edit": name, "facts": "timed.jsonl", **fields}
    drop(context.cache / "values")
    with_values, (edit, values_peak) = cpu(lambda: peak(lambda: solve(context, step)))
    solve_only, (_, solve_peak) = cpu(lambda: peak(lambda: solve(context, step)))
    facts_record = edit.record["facts"]
    return {
        "values": with_values - solve_only,
        "solve": solve_only,
        "steps": sum(f.get("steps", 0) for f in facts_record),
        "rank": max(edit.record["rank"].values()),
        "skipped": sum(bool(f.get("skipped")) for f in facts_record),
        "values_peak": values_peak,
        "solve_peak": solve_peak,
    }


def _mean(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over blocks of facts, and the largest of the peaks."""
    means: dict[str, Any] = {
        key: round(sum(b[key] for b in blocks) / len(blocks), 4) for key in blocks[0] if not key.endswith("_peak")
    }
    return {
        **means,
        **{key: max((b[key] for b in blocks if b[key] is not None), default=None) for key in blocks[0] if key.endswith("_peak")},
    }


def _linear(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the time ratio of most to fewest facts, divided by the ratio of their numbers, and the memory per additional fact."""
    few, many = rows[0], rows[-1]
    ratio = many["facts"] / few["facts"]
    growth: dict[str, Any] = {}
    for part in ("values", "solve"):
        growth[part] = round(many[name][part] / max(few[name][part], 1e-9) / ratio, 3)
        peaks = [row[name][f"{part}_peak"] for row in (few, many)]
        growth[f"{part}_bytes_a_fact"] = (
            None if None in peaks else round((peaks[1] - peaks[0]) / max(1, many["facts"] - few["facts"]))
        )
    totals = [row[name]["values"] + row[name]["solve"] for row in (few, many)]
    return {**growth, "both": round(totals[1] / totals[0] / ratio, 3), "at_most": LINEAR}


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds that a call takes in this process, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def peak(work: Callable[[], Any]) -> tuple[Any, int | None]:
    """Return a call's result and the resident bytes that it adds at its peak; None if the system does not report them."""
    clear = Path("/proc/self/clear_refs")
    _give_back()
    try:
        clear.write_text("5")  # forget the peak so far
    except OSError:
        return work(), None
    before = _resident("VmRSS")
    result = work()
    return result, max(0, _resident("VmHWM") - before)


def _give_back() -> None:
    """Return freed memory to the system, so that memory that is used again counts."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peer(context: MethodContext, facts: Sequence[Fact], options: argparse.Namespace, fields: dict[str, Any]) -> dict[str, Any]:
    """Solve blocks of facts with the workbench and with the reference, in turn."""
    parts = Parts.find(context)
    settings = _memit().settings()
    before = contexts(statistics_source(context, None)[0], 3)
    at = Lookup(context, parts, options.layer, "subject_last", before)
    second = moments(context, parts, [options.layer], None, options.tokens_per_input)[options.layer]
    covariance = (second.vectors * second.values) @ second.vectors.T
    step = _memit()
    width = parts.width(options.layer)
    ridge = 1e-6 * second.scale * torch.eye(width, dtype=torch.float64)
    blocks, agreement = [], []
    for number in range(options.blocks):
        block = list(facts[number * options.peer : (number + 1) * options.peer])
        groups, key = grouped(block, "subject_last"), f"peer-{json_digest(number)}"
        drop(context.cache / "values")
        values_seconds, workbench_values = cpu(partial(values, at, groups, settings, key))
        keys, changes = (
            torch.stack([v.key for v in workbench_values]).double().T,
            torch.stack([v.change for v in workbench_values]).double().T,
        )
        solving, _ = cpu(partial(_solved, step, second, keys, changes))
        peer_seconds, peer_values = cpu(partial(_peers, context, parts, options.layer, block, before))
        rank_one, _ = cpu(partial(_each, partial(rome, covariance + ridge), peer_values))
        sequence, _ = cpu(partial(_each, lambda found: memit(covariance, [found], 0.1 * width), peer_values))
        joint, _ = cpu(partial(memit, covariance, peer_values, 0.1 * width))
        agreement += (
            [] if len(groups) < len(block) else [_cosine(v.change, f) for v, f in zip(workbench_values, peer_values, strict=True)]
        )
        blocks.append(
            {
                "facts": len(block),
                "values": [round(values_seconds, 3), round(peer_seconds, 3)],
                "steps": [sum(v.steps for v in workbench_values), sum(f.steps for f in peer_values)],
                "top": [sum(v.top for v in workbench_values), sum(f.top for f in peer_values)],
                "solve": round(solving, 4),
                "rome": round(rank_one, 4),
                "memit_one_by_one": round(sequence, 4),
                "memit_joint": round(joint, 4),
            }
        )
        print(f"  block {number + 1}/{options.blocks}: {blocks[-1]}", flush=True)
    return {
        "layer": options.layer,
        "facts": options.peer * options.blocks,
        "blocks": blocks,
        "ratio": ratios(blocks),
        "cosine": {"least": min(agreement, default=None), "median": float(np.median(agreement)) if agreement else None},
    }


def _memit() -> ClosedForm:
    """Return a step of memit with default settings."""
    return method(ClosedForm, "memit").model_validate({"edit": "memit", "facts": "facts.jsonl"})


def _solved(step: ClosedForm, second: Moments, keys: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """Return ΔW [outputs, inputs] as a step of memit solves it."""
    left, right = solve_keys(keys.T, step.metric(second), step.ridge).update(changes.T)
    return left @ right


def _peers(context: MethodContext, parts: Parts, layer: int, facts: Sequence[Fact], before: Sequence[str]) -> list[PeerValue]:
    """Return the values of facts as the peer finds them, one after the other."""
    return [value_of(context, parts, layer, fact, before, _memit().settings()) for fact in facts]


def _each(solve_one: Callable[[PeerValue], torch.Tensor], found: Sequence[PeerValue]) -> list[torch.Tensor]:
    """Return the update of each value alone."""
    return [solve_one(value) for value in found]


def _cosine(change: torch.Tensor, other: PeerValue) -> float:
    """Return the cosine between the two value changes of one fact."""
    return round(float(torch.nn.functional.cosine_similarity(change, other.change, dim=0)), 4)


def ratios(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the peer's CPU seconds divided by the workbench's, with bootstrap intervals over blocks."""
    workbench = np.array([b["values"][0] + b["solve"] for b in blocks])
    draws = np.random.default_rng(0).integers(0, len(blocks), (DRAWS, len(blocks)))
    ratios_of = {}
    for name, peer in {
        "values": np.array([b["values"][1] for b in blocks]),
        "rome": np.array([b["values"][1] + b["rome"] for b in blocks]),
        "memit": np.array([b["values"][1] + b["memit_one_by_one"] for b in blocks]),
    }.items():
        own = np.array([b["values"][0] for b in blocks]) if name == "values" else workbench
        low, high = np.percentile(peer[draws].sum(1) / own[draws].sum(1), (2.5, 97.5))
        ratios_of[name] = {"value": round(peer.sum() / own.sum(), 2), "low": round(low, 2), "high": round(high, 2)}
    return ratios_of


if __name__ == "__main__":
    main()

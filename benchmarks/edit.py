"""What edits cost: values and the linear solve apart, memory, and a straightforward implementation on the same facts in the same run.

    python benchmarks/edit.py
    python benchmarks/edit.py --numbers 2 4 --fixture-numbers 2 4 --peer 2 --blocks 1      a quick look

1. On the starter base, at one layer: statistics once; then for each number of facts the values (ROME's optimisation; refining included)
   from an empty cache, and the solve (statistics read, keys read, the system, the factors) with the values there. The same on the trained
   fixture, with more facts. `linear` is the time of the most facts over that of the fewest, by the ratio of their numbers: at most 1.1.
2. Peak memory above what is held before, of values and of the solve, and its growth a fact: beside one covariance of the projection.
3. The peer (`edit_reference.py`): ROME and MEMIT one fact after the other, through the whole model, with systems of the projection's whole
   width. Blocks of facts in turn with the workbench; the interval of the ratio is a bootstrap over blocks.

CPU seconds of one thread. Results go to benchmarks/results/edit.json.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edit_reference import Found, memit, rome, value_of
from edit_setup import COUNTERFACT, PROJECT, STARTER, drop, live_context, make_project, one_thread, published
from edit_single import solve
from record import parser_of, write_results

from workbench.edit.closed_form.contexts import contexts
from workbench.edit.closed_form.moments import moments, statistics_source
from workbench.edit.closed_form.solver import right_factor
from workbench.edit.closed_form.values import grouped, values
from workbench.edit.places.parts import Parts
from workbench.facts import Fact, write_facts
from workbench.files import json_digest
from workbench.recipe.methods import method
from workbench.steps import MethodContext

METHODS = ("rome", "memit")
LINEAR = 1.1
BLOCKS = 4  # of few facts, whose mean counts: single facts differ in the steps that they take
DRAWS = 2000


def main() -> None:
    """All parts, the results file."""
    parser = parser_of(__doc__, "edit")
    parser.add_argument("--facts", type=Path, default=COUNTERFACT, help="a CounterFact file")
    parser.add_argument("--numbers", type=int, nargs="+", default=[10, 100], help="facts on the starter base")
    parser.add_argument("--fixture-numbers", type=int, nargs="+", default=[10, 100, 1000], help="facts on the fixture")
    parser.add_argument("--layer", type=int, default=7, help="layer of the starter base")
    parser.add_argument("--fixture-layer", type=int, default=1, help="layer of the fixture")
    parser.add_argument("--peer", type=int, default=8, help="facts of a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks; 0: without the peer")
    parser.add_argument("--tokens-per-input", type=int, default=10, help="of the statistics")
    given = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        facts = published(given.facts, max(*given.numbers, given.peer * given.blocks), 0)
        project = make_project(Path(scratch) / "starter", PROJECT / STARTER, facts)
        fields = {
            "layers": [given.layer],
            "position": "subject_last",
            "tokens_per_input": given.tokens_per_input,
            "unconverged": "skip",
        }
        context = live_context(project)
        document: dict[str, Any] = {
            "file": given.facts.name,
            "starter": {"base": STARTER, **timed(context, facts, given.numbers, fields)},
        }
        if given.blocks:
            document["peer"] = peer(context, facts, given, fields)
        document["fixture"] = fixture(Path(scratch) / "fixture", given)
    write_results(given.out, document)


def fixture(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The same on the trained fixture."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from worlds import people

    facts = people.facts(max(given.fixture_numbers))
    project = make_project(folder, people.SUBJECT, facts)
    (project / "text.txt").write_text("\n\n".join(people.lines(3000, seed=1)), "utf-8")
    fields = {"layers": [given.fixture_layer], "position": "subject_last", "statistics": "text.txt", "unconverged": "skip"}
    return {"base": "tests/fixtures/people/subject", **timed(live_context(project), facts, given.fixture_numbers, fields)}


def timed(context: MethodContext, facts: Sequence[Fact], numbers: Sequence[int], fields: dict[str, Any]) -> dict[str, Any]:
    """Statistics, then values and solve of each number of facts."""
    parts = Parts.of(context)
    (layer,) = fields["layers"]
    width = parts.width(layer)
    seconds, _ = cpu(lambda: moments(context, parts, [layer], fields.get("statistics"), fields.get("tokens_per_input", 10)))
    found: dict[str, Any] = {"layer": layer, "inputs": width, "covariance_bytes": 8 * width**2, "statistics": round(seconds, 2)}
    _once(context, facts[:1], "memit", fields)  # what is loaded once is loaded
    rows = []
    for number in sorted(numbers):
        starts = range(0, max(numbers) - number + 1, number)[:BLOCKS]
        row: dict[str, Any] = {"facts": number, "blocks": len(starts)}
        for name in METHODS:
            row[name] = _mean([_once(context, facts[start : start + number], name, fields) for start in starts])
        rows.append(row)
        print(row, flush=True)
    return {**found, "rows": rows, "linear": {name: _linear(rows, name) for name in METHODS}}


def _once(context: MethodContext, facts: Sequence[Fact], name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One edit twice: with an empty cache of values, and again."""
    write_facts(context.project / "timed.jsonl", list(facts))
    step = {"edit": name, "facts": "timed.jsonl", **fields}
    drop(context.cache / "values")
    whole, (edit, grown) = cpu(lambda: peak(lambda: solve(context, step)))
    alone, (_, held) = cpu(lambda: peak(lambda: solve(context, step)))
    told = edit.record["facts"]
    return {"values": whole - alone, "solve": alone, "steps": sum(f.get("steps", 0) for f in told), "rank": max(edit.record["rank"].values()),
            "skipped": sum(bool(f.get("skipped")) for f in told), "values_peak": grown, "solve_peak": held}  # fmt: skip


def _mean(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over blocks of facts, of the peaks the largest."""
    found: dict[str, Any] = {
        key: round(sum(b[key] for b in blocks) / len(blocks), 4) for key in blocks[0] if not key.endswith("_peak")
    }
    return {
        **found,
        **{key: max((b[key] for b in blocks if b[key] is not None), default=None) for key in blocks[0] if key.endswith("_peak")},
    }


def _linear(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Time of the most facts over that of the fewest, by the ratio of their numbers; memory a fact between the two."""
    few, many = rows[0], rows[-1]
    times = many["facts"] / few["facts"]
    found: dict[str, Any] = {}
    for part in ("values", "solve"):
        found[part] = round(many[name][part] / max(few[name][part], 1e-9) / times, 3)
        peaks = [row[name][f"{part}_peak"] for row in (few, many)]
        found[f"{part}_bytes_a_fact"] = (
            None if None in peaks else round((peaks[1] - peaks[0]) / max(1, many["facts"] - few["facts"]))
        )
    both = [row[name]["values"] + row[name]["solve"] for row in (few, many)]
    return {**found, "both": round(both[1] / both[0] / times, 3), "at_most": LINEAR}


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and the result."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def peak(work: Callable[[], Any]) -> tuple[Any, int | None]:
    """The result of a piece of work, and its peak of resident bytes above those before it; None where the system does not tell."""
    clear = Path("/proc/self/clear_refs")
    _give_back()
    try:
        clear.write_text("5")  # forget the peak so far
    except OSError:
        return work(), None
    before = _resident("VmRSS")
    found = work()
    return found, max(0, _resident("VmHWM") - before)


def _give_back() -> None:
    """Return freed memory to the system, so that what is used again counts."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peer(context: MethodContext, facts: Sequence[Fact], given: argparse.Namespace, fields: dict[str, Any]) -> dict[str, Any]:
    """Blocks of facts by the workbench and by the reference, in turn."""
    parts = Parts.of(context)
    settings = _settings()
    before = contexts(statistics_source(context, None)[0], 3)
    second = moments(context, parts, [given.layer], None, given.tokens_per_input)[given.layer]
    whole = (second.vectors * second.values) @ second.vectors.T
    step = method("edit", "memit").model_validate({"edit": "memit", "facts": "facts.jsonl"})
    width = parts.width(given.layer)
    ridge = 1e-6 * second.scale * torch.eye(width, dtype=torch.float64)
    blocks, agreement = [], []
    for number in range(given.blocks):
        chosen = list(facts[number * given.peer : (number + 1) * given.peer])
        groups, key = grouped(chosen, "subject_last"), f"peer-{json_digest(number)}"
        drop(context.cache / "values")
        ours, mine = cpu(lambda g=groups, key=key: values(context, parts, given.layer, g, "subject_last", before, settings, key))
        keys, changes = torch.stack([v.key for v in mine]).double().T, torch.stack([v.change for v in mine]).double().T
        solving, _ = cpu(lambda k=keys, c=changes: c @ right_factor(k, step.metric(second, width), step.ridge(width)).T)
        theirs, other = cpu(lambda c=chosen: [value_of(context, parts, given.layer, fact, before, settings) for fact in c])
        rank_one, _ = cpu(lambda o=other: [rome(whole + ridge, found) for found in o])
        sequence, _ = cpu(lambda o=other: [memit(whole, [found], 0.1 * width) for found in o])
        joint, _ = cpu(lambda o=other: memit(whole, o, 0.1 * width))
        agreement += [] if len(groups) < len(chosen) else [_cosine(v.change, f) for v, f in zip(mine, other, strict=True)]
        blocks.append({"facts": len(chosen), "values": [round(ours, 3), round(theirs, 3)], "steps": [sum(v.steps for v in mine), sum(f.steps for f in other)],
                       "top": [sum(v.top for v in mine), sum(f.top for f in other)], "solve": round(solving, 4), "rome": round(rank_one, 4),
                       "memit_one_by_one": round(sequence, 4), "memit_joint": round(joint, 4)})  # fmt: skip
        print(f"  block {number + 1}/{given.blocks}: {blocks[-1]}", flush=True)
    return {"layer": given.layer, "facts": given.peer * given.blocks, "blocks": blocks, "ratio": ratios(blocks),
            "cosine": {"least": min(agreement, default=None), "median": float(np.median(agreement)) if agreement else None}}  # fmt: skip


def _settings() -> Any:
    """Those that rome and memit have by default."""
    step = method("edit", "memit").model_validate({"edit": "memit", "facts": "facts.jsonl"})
    return step.settings()


def _cosine(change: torch.Tensor, other: Found) -> float:
    """Of the two sides' wanted changes of one fact."""
    return round(float(torch.nn.functional.cosine_similarity(change, other.change, dim=0)), 4)


def ratios(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The peer's CPU seconds over the workbench's, values and solve together, and values alone; bootstrap over blocks."""
    ours = np.array([b["values"][0] + b["solve"] for b in blocks])
    draws = np.random.default_rng(0).integers(0, len(blocks), (DRAWS, len(blocks)))
    found = {}
    for name, theirs in {
        "values": np.array([b["values"][1] for b in blocks]),
        "rome": np.array([b["values"][1] + b["rome"] for b in blocks]),
        "memit": np.array([b["values"][1] + b["memit_one_by_one"] for b in blocks]),
    }.items():
        under = np.array([b["values"][0] for b in blocks]) if name == "values" else ours
        low, high = np.percentile(theirs[draws].sum(1) / under[draws].sum(1), (2.5, 97.5))
        found[name] = {"value": round(theirs.sum() / under.sum(), 2), "low": round(low, 2), "high": round(high, 2)}
    return found


if __name__ == "__main__":
    main()

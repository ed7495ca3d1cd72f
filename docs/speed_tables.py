"""Tables of the page on speed: what each measured work takes here, by its peer, and by the least that any program does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cells import BLOCKS, MISSING, block, cite, results, table

FOLDER = "benchmarks/results"
MERGE, CORE = f"{FOLDER}/merge-M.json", f"{FOLDER}/core-space.json"
Row = tuple[str, str, float | None, float | None, float, float | None]
"""A work, its peer, the peer's CPU seconds and ours (None if only the ratio was measured), their ratio, ours without start-up over the floor."""


def _merged(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        peer, own = row["mergekit_bfloat16"], row["workbench"]["cpu"]
        yield f"merge, 0.5 B, `{row['method']}`", "mergekit", peer["cpu"], own, peer["cpu_ratio"], row["over_floor"]
        if cold := row.get("cold"):
            work = f"the same, from the disk (wall), `{row['method']}`"
            yield (
                work,
                "plain read and write",
                cold["floor"],
                cold["workbench"],
                round(cold["floor"] / cold["workbench"], 2),
                None,
            )


def _spectral(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        work, peer = f"`{row['method']}` of {found['adapters']} adapters, one layer", row["whole_seconds"]
        yield work, "whole deltas", peer, row["factors_seconds"], row["ratio"], None


def _scored(found: dict[str, Any]) -> Iterator[Row]:
    inner = found["in_process"]
    for task, scorer in (("long", "packed"), ("letters", "prefix")):
        peer, own = (inner[task]["seconds"][name] for name in ("hflm", scorer))
        yield f"choices, `{task}`", "HFLM", peer, own, inner[task][scorer]["time_ratio"], inner[task][scorer]["over_bare"]
    for prompts, row in found.get("texts", {}).get(found["dtype"], {}).items():
        yield f"greedy texts, {prompts}", "HFLM", None, None, row["time_ratio"], None
    for whole in [found["processes"]] if isinstance(found["processes"], dict) else found["processes"]:
        work = f"`eval` of {whole['configurations']} configurations"
        yield work, "`lm_eval`", whole["lm_eval_seconds"], whole["seconds"], whole["ratio"], None


def _searched(found: dict[str, Any]) -> Iterator[Row]:
    peer, own, work = found["peer"]["cpu"], found["search"]["cpu"], f"`search`, {found['candidates']} candidates"
    yield work, "mergekit and `lm_eval`", peer, own, found["ratio"]["search"]["cpu"], None


def _solved(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        peer, own = (sorted(row[name])[1] for name in ("reference_seconds", "seconds"))
        work = f"`memit`'s solve, {row['facts']:,} facts, {row['inputs']} inputs"
        yield work, "the formulas, float64", peer, own, row["ratio"], None


def _routed(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["results"]:
        yield f"generation, mixed batch, adapters: {row['bricks']}", "PEFT", None, None, row["peft mixed"]["decode_ratio"], None


def _trained(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["results"]:
        step = row["seconds_a_step"]
        yield f"`brick train`, a step, {row['rows']}", "PEFT and the Trainer", step["peft"], step["workbench"], row["ratio"], None


def _started(found: dict[str, Any]) -> Iterator[Row]:
    least = found["commands"]["import torch"]["seconds"]
    for name in ("--help", "methods", "plan", "runs ls", "compare", "report"):
        own = found["commands"][name]["seconds"]
        yield f"start, `{name}`", "`import torch`", least, own, round(least / own, 1), None


SOURCES: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "merge-S": _merged,
    "core-space": _spectral,
    "eval": _scored,
    "search": _searched,
    "edit-solve": _solved,
    "route": _routed,
    "train": _trained,
    "startup": _started,
}


def speed_block(project: Path) -> str:
    """Every work of which the time was measured beside a peer's, and where the figures come from."""
    rows, sources = [], []
    for name, rows_of in SOURCES.items():
        found = results(project, f"{FOLDER}/{name}.json")
        if found is None:
            continue
        for work, peer, theirs, own, ratio, floor in rows_of(found):
            rows.append([work, peer, _seconds(theirs), _seconds(own), f"{ratio:g}", "" if floor is None else f"{floor:g}", name])
        link = f"[{name}](../{FOLDER}/{name}.json)"
        calls = [found, *_own_calls(found)]
        sources += [[link, call["machine"], f"`{call['command']}`", call["commit"][:8]] for call in calls]
    if not rows:
        return MISSING
    heads = ["work", "peer", "peer, CPU s", "here, CPU s", "ratio", "over the floor", "source"]
    return "\n\n".join([table(heads, rows), table(["source", "machine", "command", "commit"], sources, left=4)])


def _own_calls(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The calls, with their machines and commits, of rows that were not measured by the file's last one."""
    rows = found["rows"] if isinstance(found.get("rows"), list) else []
    calls: list[dict[str, str]] = []
    for row in rows:
        if "measured" in row and row["measured"] not in calls:
            calls.append(row["measured"])
    return calls


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def merge_block(project: Path) -> str:
    """Merging checkpoints of 1.6 B parameters: CPU time and peak memory, beside mergekit in the same run."""
    found = results(project, MERGE)
    if found is None or not all("floor" in row for row in found["rows"]):  # files of before the floor was measured
        return MISSING
    heads = ["merge", "CPU s", "peak GB", "over floor"]
    for dtype in ("bfloat16", "float32"):
        heads += [f"mergekit {dtype}, CPU s", "peak GB", "ratio", "ratio without start-up"]
    rows = [
        [
            f"`{row['method']}`",
            f"{row['workbench']['cpu']:.1f}",
            _gigabytes(row["workbench"]),
            str(row["over_floor"]),
            *_peer(row.get("mergekit_bfloat16")),
            *_peer(row.get("mergekit_float32")),
            str(row.get("two_threads", {}).get("wall_ratio", "")),
        ]
        for row in found["rows"]
    ]
    layers, hidden, mlp, _ = found["shape"]
    note = (
        f"Random bf16 llama checkpoints of {layers} layers, hidden size {hidden}, MLP {mlp}: base and three fine-tunes (two for `slerp`), or three "
        "rank-16 adapters (`lora`, task arithmetic). CPU seconds and peak resident memory of whole processes on one thread. Ratios are mergekit's CPU "
        "seconds over the workbench's, start-up included, then with the start-up of both taken off. Over floor: CPU seconds without start-up over those "
        "of a process that only reads the inputs and writes the output. Two threads: wall time on one over wall time on two. mergekit computes in the "
        f"dtype that its column names. {cite(found, MERGE)}"
    )
    return table([*heads, "two threads"], rows, left=1) + "\n\n" + note


def _peer(row: Mapping[str, Any] | None) -> list[str]:
    """mergekit's cells: CPU seconds, peak, ratio, ratio without start-up."""
    if row is None:
        return [""] * 4
    return [f"{row['cpu']:.1f}", _gigabytes(row), str(row["cpu_ratio"]), str(row["cpu_ratio_without_start"])]


def _gigabytes(row: Mapping[str, Any]) -> str:
    planned = f" (plan {row['planned_peak'] / 1e9:.2f})" if "planned_peak" in row else ""
    return f"{row['peak'] / 1e9:.2f}{planned}"


@block("core", CORE)
def core_block(found: dict[str, Any]) -> str:
    """Spectral merges of adapters on one layer: from their factors, and from whole deltas."""
    rows = [
        [
            f"`{r['method']}`",
            f"{r['factors_seconds']:.2f}",
            f"{r['whole_seconds']:.1f}",
            f"{r['ratio']}",
            f"{r['relative_difference']:.1e}",
        ]
        for r in found["rows"]
    ]
    heads = ["merge", "from factors, CPU s", "whole deltas, CPU s", "ratio", "relative difference"]
    note = (
        f"{found['adapters']} random adapters of rank {found['rank']} on a {found['size']} x {found['size']} layer, float32, "
        f"{found['threads']} thread; the bases that they share and their core matrices take {found['basis_seconds']:.2f} s of the first "
        f"column."
    )
    return table(heads, rows, left=1) + "\n\n" + note


BLOCKS.update({"speed": speed_block, "merge": merge_block})

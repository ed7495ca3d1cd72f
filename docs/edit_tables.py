"""Tables of edits, from the results files of benchmarks/edit*.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import BLOCKS, MISSING, block, cite, interval, results, table

FIXTURES = {
    "benchmarks/results/edit-fixture.json": "facts found at the subject",
    "benchmarks/results/edit-fixture-prompt.json": "facts found at the prompt's last token",
}
FIXTURE_FACTS = 100
MERGE = "benchmarks/results/edit-merge.json"
SPEED = "benchmarks/results/edit.json"
SOLVE = "benchmarks/results/edit-solve.json"

Row = Mapping[str, Any]
MERGES = {"task-arithmetic": "task arithmetic", "ties": "TIES", "dare": "DARE"}


def _name(row: Row) -> str:
    return "base, not edited" if row["row"] == "base" else f"`{row['row']}`"


def fixture_block(project: Path) -> str:
    """The same methods on the trained fixtures, with FIXTURE_FACTS facts at once."""
    found = {name: results(project, name) for name in FIXTURES}
    kinds = ("efficacy", "paraphrase", "neighbours", "portability")
    cells: dict[str, list[str]] = {}
    for document in found.values():
        if document is None:
            return MISSING
        part = next(part for part in document["numbers"] if part["facts"] == FIXTURE_FACTS)
        for row in part["rows"]:
            shares = "–" if "error" in row else ", ".join(f"{100 * row['scores'][kind]['value']:.0f}" for kind in kinds)
            cells.setdefault(_name(row), []).append(shares)
    note = (
        f"Percent of prompts of {FIXTURE_FACTS} facts at once: said, paraphrases, neighbours unchanged, portability. –: refused. "
        + " ".join(cite(document, name) for name, document in found.items() if document)
    )
    return table(["edit", *FIXTURES.values()], [[name, *row] for name, row in cells.items()]) + "\n\n" + note


@block("edit-merge", MERGE)
def merge_block(found: dict[str, Any]) -> str:
    """Facts after a merge with two skills, and after a rebase onto it."""
    rows = [line for row in found["rows"] for line in _merges(row)]
    heads = ["edit", "merge", "said", "after the rebase", "paraphrases", "after the rebase", "neighbours", *found["skills"]]
    alone = ", ".join(f"`{row['method']}` {interval(row['alone']['efficacy'])} %" for row in found["rows"])
    note = (
        f"{found['facts']} facts as one brick, merged with {' and '.join(f'`{s}`' for s in found['skills'])}, all with weight 1: "
        f"{'; '.join(_settings(name, fields) for name, fields in found['merges'].items())}. Said, paraphrases: percent of those right alone, {alone}. Skills: in the merge with "
        f"the edit, and after the rebase in brackets."
    )
    return table(heads, rows) + "\n\n" + note


def _merges(row: Row) -> Iterator[list[str]]:
    for merge, found in row["merges"].items():
        merged, rebased = found["merged"], found["rebased"]
        kept = [interval(c["survival"].get(kind)) for kind in ("efficacy", "paraphrase") for c in (merged, rebased)]
        skills = [f"{_whole(merged['skills'][s])} ({_whole(rebased['skills'][s])})" for s in merged["skills"]]
        yield [f"`{row['method']}`", MERGES.get(merge, merge), *kept, interval(merged["neighbours"]), *skills]


def _whole(found: Row) -> str:
    return f"{round(100 * found['value'])}"


def _settings(name: str, fields: Row) -> str:
    return f"{MERGES.get(name, name)} (" + ", ".join(f"`{key}: {value}`" for key, value in fields.items() if key != "merge") + ")"


@block("edit-speed", SPEED)
def speed_block(found: dict[str, Any]) -> str:
    """Values and solve apart, memory, and a straightforward implementation in the same run."""
    rows = [
        [
            f"`{name}`",
            title,
            str(row["facts"]),
            f"{row[name]['values']:.2f}",
            f"{row[name]['solve']:.2f}",
            _megabytes(max(row[name]["values_peak"], row[name]["solve_peak"])),
        ]
        for title, part in _places(found)
        for name in part["linear"]
        for row in part["rows"]
        if name in row and name == "memit"
    ]
    heads = ["edit", "model", "facts", "values, CPU s", "solve, CPU s", "peak MB"]
    notes = [f"{title.capitalize()}: statistics take {part['statistics']:.1f} CPU s, once." for title, part in _places(found)]
    return "\n\n".join([table(heads, rows), *_peer(found.get("peer")), " ".join(notes)])


@block("edit-solve", SOLVE)
def solve_block(found: dict[str, Any]) -> str:
    """The linear solve alone, for thousands of facts, beside systems that grow with the facts."""
    parts = [
        f"{row['most']:,} facts on {row['inputs']:,} inputs take {row['most_seconds']:.1f} CPU s and {_megabytes(row['most_peak'])} MB; of {row['facts']:,} facts, "
        f"one system for all facts and beginnings takes {row['ratio']:.0f} times as long"
        for row in found["rows"]
    ]
    return f"The solve alone: {'; '.join(parts)}."


def _places(found: Row) -> list[tuple[str, Row]]:
    return [(title, found[key]) for key, title in (("starter", "starter base"), ("fixture", "fixture")) if key in found]


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def _peer(found: Row | None) -> list[str]:
    """How many times longer a straightforward implementation takes."""
    if not found:
        return []
    blocks, ratio = found["blocks"], found["ratio"]["memit"]
    facts = sum(b["facts"] for b in blocks)
    theirs = sum(b["values"][1] + b["memit_one_by_one"] for b in blocks) / facts
    return [
        f"The papers' formulas, one fact after the other (`benchmarks/edit_reference.py`), take {theirs:.1f} CPU s a fact on the starter base, where `memit` takes "
        f"{_ours(blocks) / facts:.1f}: {ratio['value']} [{ratio['low']}, {ratio['high']}] times as long."
    ]


def _ours(blocks: Sequence[Row]) -> float:
    return float(sum(b["values"][0] + b["solve"] for b in blocks))


BLOCKS.update(
    {
        "edit-fixture": fixture_block,
    }
)

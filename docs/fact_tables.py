"""The table of docs/facts.md: how often `facts check` tells that two prompts ask one question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cells import MISSING, measured, results, table

WORDINGS = "benchmarks/results/fact-wordings.json"
PAIRS = {
    "relations, one": "two templates of one relation",
    "zsRE": "zsRE, prompt and rephrasing",
    "WikiBigEdit": "WikiBigEdit, prompt and rephrasing",
    "relations, two": "templates of two relations of one subject",
}
WAYS = ("forms", "encoder", "both")


def wordings_block(project: Path) -> str:
    """Pairs that are taken for one question, by forms alone, by the encoder, and by either."""
    found = results(project, WORDINGS)
    if found is None:
        return MISSING
    counts = {(row["pairs"], row["way"]): row for row in found["rows"]}
    rows = table(
        ["pairs", "one question", "number", "forms, relations", "encoder", "either"],
        (
            [label, "no" if pairs == "relations, two" else "yes", str(counts[pairs, "forms"]["count"])]
            + [str(counts[pairs, way]["found"]) for way in WAYS]
            for pairs, label in PAIRS.items()
        ),
    )
    highest = found["highest_of_two_relations"][0]
    right, wrong = (counts[pairs, "encoder"]["found"] for pairs in ("relations, one", "relations, two"))
    note = (
        f"Pairs reported as one question, with {found['encoder']} and its threshold {found['threshold']:.2f}. "
        f"Of the {right + wrong} pairs of templates that the encoder reports, {right} are right; the most similar wrong one "
        f"({highest['similarity']:.2f}) is {highest['prompts'][0]!r} and {highest['prompts'][1]!r}. {measured(found)} "
        f"The source: [{WORDINGS}](../{WORDINGS})."
    )
    return f"{rows}\n\n{note}"


BLOCKS: dict[str, Callable[[Path], str]] = {"fact_wordings": wordings_block}

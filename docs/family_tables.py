"""The table of docs/families.md: what works with each family of models, and why the rest does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cells import block, measured, table

FAMILIES = "benchmarks/results/families.json"
COLUMNS = {
    "merge": "merge",
    "edit": "edit",
    "grow: depth": "grow depth",
    "grow: neurons": "grow width",
    "grow: experts": "grow experts",
    "route": "route",
}
"""Operation of the results file -> head of its column."""
_WORDS = {"refused": "no", "untested": "untested", "wrong": "wrong"}
_SHORTER = (
    (r"^step [\w-]+: ", ""),
    (r"layer \d+ of \w+", "a layer"),
    (r"^layer \d+: ", "in a layer: "),
    (r"layer \d+", "a layer"),
    (r"model_type [\w-]+", "this type"),
    (r"; supported: .*", ""),
    (r"\w+For\w+|\w+LMHeadModel\w*", "the model"),
)


@block("families", FAMILIES, cited=False)
def families_block(found: dict[str, Any]) -> str:
    """A row a family; numbers in brackets name the reasons below."""
    reasons: dict[str, int] = {}
    rows = []
    for family, outcomes in found["families"].items():
        cells = [_cell(outcomes[name], reasons) for name in COLUMNS]
        rows.append([f"`{family.partition(':')[0]}`", f"`{outcomes['class']['said']}`", *cells])
    parts = [table(["model_type", "class", *COLUMNS.values()], rows, left=8)]
    parts.append(
        f"{_counts(found)} {measured(found)} transformers {found['transformers']}. The source: [{FAMILIES}](../{FAMILIES})."
    )
    parts.append("Why not:\n\n" + "\n".join(f"{number}. {reason}" for reason, number in reasons.items()))
    if found["not_tiny"]:
        parts.append(
            "Not built tiny, so not walked:\n\n"
            + "\n".join(f"- `{name}`: {reason}." for name, reason in found["not_tiny"].items())
        )
    if found["not_walked"]:
        names = ", ".join(f"`{name}`" for name in found["not_walked"])
        parts.append(f"Not walked yet ({len(found['not_walked'])}): {names}.")
    return "\n\n".join(parts)


def _cell(outcome: Mapping[str, str], reasons: dict[str, int]) -> str:
    """Return "yes", or "no", "untested" or "wrong" with the number of its reason."""
    if outcome["status"] == "works":
        return "yes"
    number = reasons.setdefault(reason(outcome["said"]), len(reasons) + 1)
    return f"{_WORDS[outcome['status']]} ({number})"


def reason(said: str) -> str:
    """Return the message of a refusal without what differs between families."""
    for pattern, shorter in _SHORTER:
        said = re.sub(pattern, shorter, said)
    return said.replace("<", "&lt;")


def _counts(found: Mapping[str, Any]) -> str:
    """Return how many of the walked families each operation works with."""
    families = found["families"].values()
    counts = [f"{head} {sum(f[name]['status'] == 'works' for f in families)}" for name, head in COLUMNS.items()]
    return f"Of {len(families)} families that were walked, these work: {', '.join(counts)}."

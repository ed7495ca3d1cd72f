"""docs/families.csv and the counts of docs/families.md: what works with each family of models, and why the rest does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cells import block, table

from workbench.ground.tables import csv_text

FAMILIES = "benchmarks/results/families.json"
COLUMNS = {
    "merge": "merge",
    "adapters": "LoRA merge",
    "core": "core space",
    "slices": "slices",
    "eval": "eval",
    "edit": "edit",
    "grow: depth": "grow depth",
    "grow: neurons": "grow width",
    "grow: experts": "grow experts",
    "route": "route",
    "mergekit": "mergekit's merge",
}
"""Operation of the results file -> head of its column."""
PUBLISHED = "benchmarks/results/published-families.json"
PAIRS = {
    "full": "full fine-tune",
    "native": "full fine-tune under live names",
    "lora": "LoRA",
    "text": "text model alone",
    "text_lora": "LoRA on the text model",
    "extract": "extracted adapter",
}
"""Pair of the results file -> its name in the table."""
_PUBLISHED = {"exact": "yes", "refused": "no", "wrong": "wrong", "not built": "not built"}
_NO_PAIR = ("a text model", "the same names as save_pretrained's", "the class of the other LoRA")
"""Why a pair does not exist."""
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


def families_csv(found: dict[str, Any], published: dict[str, Any] | None = None) -> str:
    """A row a family: whether each operation works, or the reason why not.

    Args:
        found: The walk over all families.
        published: The walk over bases as published; None leaves its columns empty.
    """
    rows = []
    for family, outcomes in found["families"].items():
        rows.append([family.partition(":")[0], outcomes["class"]["said"], *(_cell(outcomes[name]) for name in COLUMNS)])
    for family, why in found["not_tiny"].items():
        kind, _, name = family.partition(":")
        rows.append([kind, name, *[f"not walked: {why}"] * len(COLUMNS)])
    rows += [[family, "", *["not walked yet"] * len(COLUMNS)] for family in found["not_walked"]]
    cells = _published_cells(published["families"] if published else {})
    for row in rows:
        key = next((key for key in cells if key[0] == row[0] and row[1] in (key[1], "")), None)
        row += cells.pop(key) if key else ["", ""]
    rows += [[kind, name, *["not walked"] * len(COLUMNS), *cell] for (kind, name), cell in cells.items()]
    return csv_text(["model_type", "class", *COLUMNS.values(), "published", "published names"], rows)


def _published_cells(families: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Return (type, class) -> what merges on bases of that class as published, and where their names are from."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in families.values():
        made = [name for name in PAIRS if row[name]["status"] != "not built" or row[name]["said"] not in _NO_PAIR]
        said = [f"{PAIRS[name]}: {_PUBLISHED[row[name]['status']]}" + _why(row[name]) for name in made]
        if len({(row[name]["status"], row[name]["said"]) for name in PAIRS}) == 1:
            said = [_PUBLISHED[row["full"]["status"]] + _why(row["full"])]
        source = ", ".join(" ".join(one) for one in row["sources"]) + (f" ({row['names']})" if row["names"] else "")
        old = cells.get((row["model_type"], row["class"]))
        text = [f"{row['models']}: {'; '.join(said)}", f"{row['models']}: {source}"]
        cells[row["model_type"], row["class"]] = [" | ".join(pair) for pair in zip(old, text, strict=True)] if old else text
    return cells


def _why(outcome: Mapping[str, str]) -> str:
    """Return a colon and the reason of an outcome that is not exact."""
    return "" if outcome["status"] == "exact" else f": {reason(outcome['said'])}"


@block("families", FAMILIES)
def families_block(found: dict[str, Any]) -> str:
    """How many families each operation works with."""
    families = found["families"].values()
    rows = [[head, str(sum(f[name]["status"] == "works" for f in families))] for name, head in COLUMNS.items()]
    note = f"{len(families)} families were walked, {len(found['not_tiny'])} others cannot be built tiny. transformers {found['transformers']}. "
    return table(["operation", "families"], rows, left=1) + "\n\n" + note


@block("published-families", PUBLISHED)
def published_block(found: dict[str, Any]) -> str:
    """How many pairs of a base as published and a brick merge exactly."""
    families = found["families"].values()
    rows = []
    for name, head in PAIRS.items():
        outcomes = [row[name] for row in families if row[name]["said"] not in _NO_PAIR]
        counts = [sum(o["status"] == status for o in outcomes) for status in _PUBLISHED]
        rows.append([head, *map(str, counts)])
    note = f"{len(families)} layouts. transformers {found['transformers']}. "
    return table(["brick", "exact", "refused", "wrong", "not built"], rows, left=1) + "\n\n" + note


SIZES = "benchmarks/results/full-sizes.json"


@block("full-sizes", SIZES)
def sizes_block(found: dict[str, Any]) -> str:
    """The peak memory that `plan` names for operations on models in their full size."""
    operations = list(next(iter(found["models"].values()))["operations"])
    rows, refused = [], dict[str, list[str]]()
    for name, model in found["models"].items():
        cells = []
        for operation in operations:
            told = model["operations"][operation]
            if "refused" in told:
                said = re.sub(r" \(.*?\)", "", reason(told["refused"]))
                refused.setdefault(said, []).append(f"{name}, {operation}")
            cells.append("no" if "refused" in told else f"{told['peak_bytes'] / 1e9:.1f}")
        rows.append([name, f"{model['parameters'] / 1e9:,.0f} B", *cells])
    why = " ".join(f"{'; '.join(places)}: {said}." for said, places in refused.items())
    note = (
        "Peak memory in GB that `plan` names, on the CPU, from headers of checkpoints in bfloat16 with the shapes of published configurations. "
        f"`adapters` are merged into a checkpoint. No: {why} Nothing was run."
    )
    return table(["model", "parameters", *operations], rows, left=1) + "\n\n" + note


def _cell(outcome: Mapping[str, str]) -> str:
    """Return "yes", or "no", "untested" or "wrong" with the reason."""
    return "yes" if outcome["status"] == "works" else f"{_WORDS[outcome['status']]}: {reason(outcome['said'])}"


def reason(said: str) -> str:
    """Return the message of a refusal without what differs between families."""
    for pattern, shorter in _SHORTER:
        said = re.sub(pattern, shorter, said)
    return " ".join(said.split())

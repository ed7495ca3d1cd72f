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


def families_csv(found: dict[str, Any]) -> str:
    """A row a family: whether each operation works, or the reason why not."""
    rows = []
    for family, outcomes in found["families"].items():
        rows.append([family.partition(":")[0], outcomes["class"]["said"], *(_cell(outcomes[name]) for name in COLUMNS)])
    for family, why in found["not_tiny"].items():
        kind, _, name = family.partition(":")
        rows.append([kind, name, *[f"not walked: {why}"] * len(COLUMNS)])
    rows += [[family, "", *["not walked yet"] * len(COLUMNS)] for family in found["not_walked"]]
    return csv_text(["model_type", "class", *COLUMNS.values()], rows)


@block("families", FAMILIES)
def families_block(found: dict[str, Any]) -> str:
    """How many families each operation works with."""
    families = found["families"].values()
    rows = [[head, str(sum(f[name]["status"] == "works" for f in families))] for name, head in COLUMNS.items()]
    note = f"{len(families)} families were walked, {len(found['not_tiny'])} others cannot be built tiny. transformers {found['transformers']}. "
    return table(["operation", "families"], rows, left=1) + "\n\n" + note


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

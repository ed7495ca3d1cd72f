"""docs/families.csv: each row is walked again, and the table holds what is found."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from worlds.family_walk import GROWTHS, NotTinyError, build, families, walk
from worlds.growing import FAMILIES, GROWN
from worlds.places import PROJECT, of_the_pinned_transformers

RESULTS: dict[str, Any] = json.loads((PROJECT / "benchmarks/results/families.json").read_text("utf-8"))
OPERATIONS = ("merge", "edit", *(f"grow: {name}" for name in GROWTHS), "route")
DEFECTS: dict[str, set[str]] = {}
"""Family -> operations that are neither right nor refused."""


def row_of_page(kind: str, name: str) -> list[str]:
    """Return the cells of a family's operations in the table, without reasons."""
    rows = csv.reader((PROJECT / "docs/families.csv").read_text("utf-8").splitlines())
    (row,) = [row for row in rows if row[:2] == [kind, name]]
    return [cell.partition(":")[0] for cell in row[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("family", RESULTS["families"])
def test_the_page_says_what_is_found(family: str, tmp_path: Path) -> None:
    found = walk(family, tmp_path / "project")
    words = {"works": "yes", "refused": "no", "untested": "untested", "wrong": "wrong"}
    page = row_of_page(family.partition(":")[0], found["class"].said)
    assert [words[found[name].status] for name in OPERATIONS] == page, found
    assert {name for name, outcome in found.items() if outcome.status == "wrong"} == DEFECTS.get(family, set()), found


@pytest.mark.slow
@pytest.mark.parametrize("family", RESULTS["not_tiny"])
def test_others_are_not_built_tiny(family: str, tmp_path: Path) -> None:
    kind, _, name = family.partition(":")
    with pytest.raises(NotTinyError):
        build(kind, name, tmp_path / "project")


@pytest.mark.skipif(not of_the_pinned_transformers(), reason="the tables belong to the version in constraints.txt")
def test_every_family_is_named() -> None:
    """No type of this transformers is missing, and growths agree with the table of tests/worlds/growing.py."""
    assert sorted([*RESULTS["families"], *RESULTS["not_tiny"], *RESULTS["not_walked"]]) == sorted(families())
    for family, outcomes in RESULTS["families"].items():
        assert {name for name, outcome in outcomes.items() if outcome["status"] == "wrong"} == DEFECTS.get(family, set())
        for name in ("depth", "neurons"):
            if family in FAMILIES:
                assert (outcomes[f"grow: {name}"]["status"] == "works") == (family in GROWN[name].split()), (family, name)

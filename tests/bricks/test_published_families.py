"""Bricks as people make them on bases as the hub publishes them: what merges exactly, what is refused, and that nothing is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worlds.places import PROJECT, of_the_pinned_transformers
from worlds.published import published
from worlds.published_pairs import PAIRS, cells, entries

RESULTS: dict[str, Any] = json.loads((PROJECT / "benchmarks/results/published-families.json").read_text("utf-8"))["families"]
REFUSED = {
    # transformers splits or permutes the fused attention of these towers
    "lora": "step3p7 kimi_k25",
    "extract": "step3p7 kimi_k25",
}
"""Pair -> the families whose brick is refused."""


def rows(status: str) -> set[tuple[str, str]]:
    """Return the pairs of the results file with an outcome."""
    return {(family, pair) for family, row in RESULTS.items() for pair in PAIRS if row[pair]["status"] == status}


def test_the_results_hold_only_known_refusals() -> None:
    assert not rows("wrong")
    assert rows("refused") == {(family, pair) for pair, named in REFUSED.items() for family in named.split()}
    assert {family for family, pair in rows("not built") if pair == "full"} == {"gemma3n"}, (
        "its tower is timm's, which is not installed"
    )


@pytest.mark.skipif(not published(), reason="the families as published are not beside the checkout")
def test_every_family_is_in_the_results() -> None:
    assert set(entries()) == set(RESULTS)


@pytest.mark.slow
@pytest.mark.skipif(not of_the_pinned_transformers(), reason="the tables belong to the version in constraints.txt")
@pytest.mark.skipif(not published(), reason="the families as published are not beside the checkout")
@pytest.mark.parametrize("family", RESULTS)
def test_a_base_as_published_takes_the_bricks_of_people(family: str, tmp_path: Path) -> None:
    found = cells(family, entries()[family], tmp_path / "project")
    assert {pair: found[pair].status for pair in PAIRS} == {pair: RESULTS[family][pair]["status"] for pair in PAIRS}, found

"""The page of a model's neurons says what the nulls and controls allow, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.report.neurons_ablation import ablation_section
from workbench.report.neurons_functions import functions_section


def functions(both: dict[str, int]) -> dict[str, Any]:
    """A document with neurons of some functions beyond the null over tasks on both splits."""
    row = {
        "best_median": 0.8,
        "best_max": 0.9,
        "layers_above_0.8": 1,
        "top": 0.5,
        "mean": 0.2,
        "prevalence": 0.5,
        "overlap": 0.4,
        "overlap_others": 0.1,
    }
    limit = {"layer": 0.7, "model": 0.8, "level": 0.01}
    return {
        "neurons": {"0": 8, "1": 8},
        "unit": "neurons",
        "data": {
            "file": "x.jsonl",
            "items": 10,
            "tokens": 50,
            "tasks": {name: {"train": ["a"], "heldout": ["b"]} for name in both},
        },
        "settings": {
            "share": 0.05,
            "per": "layer",
            "score": "mean_abs",
            "part": "prompt",
            "skip": 1,
            "draws": 20,
            "seed": 0,
            "resident": 0.01,
        },
        "nulls": {"train": {"item": limit, "task": limit}},
        "functions": [
            {
                **row,
                "function": name,
                "beyond": {"item": {"train": 9, "both": 9}, "task": {"train": 5, "both": count}},
                "confounders": {"length": 0.5, "language": 0.5, "template": 0.5},
            }
            for name, count in both.items()
        ],
        "layers": {
            "train": [
                {"function": name, "layer": layer, "best": 0.8, "top": 0.5, "mean": 0.2} for name in both for layer in (0, 1)
            ]
        },
        "overlap": {a: dict.fromkeys(both, 0.1) for a in both},
        "residents": 1,
    }


@pytest.mark.parametrize(
    ("both", "claim"),
    [
        (
            {"math": 3, "code": 0, "law": 2},
            "Single neurons tell math and law from other functions on tasks that did not choose them; for code no neuron does",
        ),
        ({"math": 0, "code": 0}, "No function has a neuron that beats chance on both splits of its tasks"),
        (
            {"math": 1, "code": 1},
            "Single neurons tell math and code from other functions on tasks that did not choose them (labels",
        ),
    ],
)
def test_functions_are_claimed_by_the_null_over_tasks(both: dict[str, int], claim: str) -> None:
    """The null over items, which all of them beat, claims nothing."""
    section = functions_section(functions(both))
    assert claim in section.lead[1]
    assert [row[7] for row in section.rows] == [str(count) for count in both.values()]


def test_ablations_stand_beside_their_matched_control() -> None:
    def table(dominant: list[bool], changes: list[list[float]]) -> dict[str, Any]:
        return {
            "dominant": dominant,
            "dominant_rows": sum(dominant),
            "changes": changes,
            "coupling": 0.5,
            "interval": [0.4, None],
        }

    document = {
        **table([True, False], [[2.0, 0.1], [3.0, 1.0]]),
        "functions": ["math", "code"],
        "share": 0.05,
        "items": 12,
        "overlap": {"mean": 0.01, "chance": 0.05},
        "controls": {
            "matched": {**table([False, False], [[0.1, 0.2], [0.3, 0.2]]), "exceeds": [0.99, 0.5]},
            "random": {**table([True, False], [[0.4, 0.3], [0.4, 0.3]]), "exceeds": [1.0, 1.0]},
        },
    }
    section = ablation_section(document)
    assert section.lead[1] == (
        "1 of 2 sets harm their own function most; not so those of code. Of random neurons with the same mean activation, 0 of 2 do."
    )
    assert [row[3] for row in section.rows] == ["", "1 of 2", "2 of 2"]
    own, matched, random = section.tables
    assert [[cell.text for cell in cells] for _, cells in own.rows] == [["200", "10"], ["300", "100"]]
    assert len(matched.rows) == 2
    assert [name for name, _ in random.rows] == ["all functions"]  # one set is the control of both

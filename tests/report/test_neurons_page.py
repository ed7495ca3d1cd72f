"""The page of a model's neurons says what the nulls and controls allow, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.report.neurons_ablation import ablation_section
from workbench.report.neurons_beside import beside_section
from workbench.report.neurons_decompose import decomposition_section
from workbench.report.neurons_facts import facts_section
from workbench.report.neurons_functions import functions_section


def functions(found: dict[str, int | None]) -> dict[str, Any]:
    """A document with some neurons found for each function; None if the test has no power for it."""
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
    return {
        "neurons": {"0": 8, "1": 8},
        "unit": "neurons",
        "data": {
            "file": "x.jsonl",
            "items": 10,
            "tokens": 50,
            "tasks": {name: {"train": ["a"], "heldout": ["b"]} for name in found},
        },
        "settings": {
            "share": 0.05,
            "per": "layer",
            "score": "mean_abs",
            "part": "prompt",
            "skip": 1,
            "seed": 0,
            "resident": 0.01,
        },
        "test": {"tasks": 12, "draws": 1000, "alpha": 0.05},
        "functions": [
            {
                **row,
                "function": name,
                "found": count or 0,
                "largest_effect": 6.25,
                "smallest_effect": None if count is None else 4.5,
                "confounders": {"length": 0.5, "language": 0.5, "template": 0.5},
            }
            for name, count in found.items()
        ],
        "layers": {
            "train": [
                {"function": name, "layer": layer, "best": 0.8, "top": 0.5, "mean": 0.2} for name in found for layer in (0, 1)
            ]
        },
        "overlap": {a: dict.fromkeys(found, 0.1) for a in found},
        "residents": 1,
    }


@pytest.mark.parametrize(
    ("found", "claim"),
    [
        (
            {"math": 3, "code": 0, "law": 2},
            "Single neurons serve math and law: on their tasks they are more active than chance explains in the whole model. For code none is "
            "found; effects below that of the column 'findable from' stay unseen.",
        ),
        (
            {"math": 0, "code": None},
            "For math none is found; effects below that of the column 'findable from' stay unseen. For code the test has no power: it needs more "
            "tasks.",
        ),
    ],
)
def test_functions_are_claimed_by_the_test(found: dict[str, int | None], claim: str) -> None:
    section = functions_section(functions(found))
    assert section.lead[1] == claim
    cells = [("no power", "6.2", "") if count is None else (str(count), "6.2", "4.5") for count in found.values()]
    assert [tuple(row[5:8]) for row in section.rows] == cells


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
    ranged = ablation_section({**document, "between": {**table([True, True], [[1.5, 0.0], [0.2, 0.9]]), "range": [-2.5, 2.5]}})
    assert ranged.lead[2] == (
        "Switched off only while its activation lies between −2.5 and 2.5 standard deviations from its mean on the function's own texts, a set "
        "changes the perplexity of its own function by 120 % (everywhere: 150 %) and that of other functions by 10 % (everywhere: 155 %), as medians."
    )
    assert [matrix.title for matrix in ranged.tables][1] == "The functions' sets, within the range"
    section = ablation_section(document)
    assert section.lead[1] == (
        "1 of 2 sets harm their own function most; not so those of code. Of random neurons with the same mean activation, 0 of 2 do."
    )
    assert [row[3] for row in section.rows] == ["", "1 of 2", "2 of 2"]
    own, matched, random = section.tables
    assert [[cell.text for cell in cells] for _, cells in own.rows] == [["200", "10"], ["300", "100"]]
    assert len(matched.rows) == 2
    assert [name for name, _ in random.rows] == ["all functions"]  # one set is the control of both


def facts(**changed: Any) -> dict[str, Any]:
    """A document of two facts, whose neurons are proved when they are suppressed."""
    change = {"own": -0.5, "random": -0.02, "others": 0.01, "drawn": [-0.02]}
    fact = {"prompt": "A is", "answer": " b", "probability": 0.25, "error": 0.01, "changes": {"suppressed": change}}
    mean = {"own": -0.5, "random": -0.02, "others": 0.01, "facts": 1, "difference": -0.48, "low": None, "high": None, "beyond": 1}
    return {
        "facts": [
            {**fact, "neurons": [{"layer": 0, "neuron": 7, "score": 0.1}] * 4},
            {**fact, "neurons": [], "changes": {}, "error": changed.get("error", 0.0)},
        ],
        "unit": "neurons",
        "neurons": 4,
        "complete": 2 - ("error" in changed),
        "undone": False,
        "changes": {"suppressed": mean},
        "layers": {"0": {"attribution": 0.75, "trace": None}, "1": {"attribution": 0.25, "trace": None}},
        "agreement": {"last": None, "subject": None},
        "note": "not traced: x.jsonl:1 has no subject",
        "settings": {"answer": "own", "at": "last", "steps": 20, "threshold": 0.2, "share": 0.7, "draws": 1, "seed": 0},
        "data": {"file": "x.jsonl"},
        **changed,
    }


def test_facts_stand_beside_random_neurons_and_the_sums() -> None:
    section = facts_section(facts())
    assert section.lead[1] == (
        "Suppressing a fact's neurons changes the probability of its answer by −50.0 % on average, random neurons change it by −2.0 %: a "
        "difference of −48.0 points over 1 fact. For 1 of them, the change exceeds that of every random draw; it changes the answers of other "
        "facts by +1.0 %."
    )
    assert section.lead[2] == "The attributions of every fact add up to the change of probability within 2 %."
    assert "not traced: x.jsonl:1 has no subject" in section.lead[3]
    assert [row[3] for row in section.rows] == ["4: 0.7, 0.7, 0.7, …", "0"]
    assert [row[4:7] for row in section.rows] == [["−50 %", "−2 %", "+1 %"], ["–", "–", "–"]]
    assert len(section.charts) == 1
    traced = {str(n): {"attribution": 0.5, "trace": {"last": 0.2, "subject": 0.1, "subject_last": 0.1}} for n in (0, 1)}
    shown = facts_section(facts(note="", layers=traced, agreement={"last": 0.5, "subject": None}))
    assert "+0.50 at the last token of the prompt" in shown.lead[3]
    assert len(shown.charts) == 3


def test_sums_that_miss_the_jump_are_stated() -> None:
    """A norm behind the branch is named as the cause only where there is one."""
    lead = facts_section(facts(error=0.9, undone=True)).lead[2]
    assert lead.startswith(
        "The attributions of 1 of 2 facts do not add up to the change of probability (largest error 90 %): a norm behind"
    )
    assert "more steps than 20" in facts_section(facts(error=0.9)).lead[2]


def test_a_decomposition_names_the_nearest_bricks_and_conflicts() -> None:
    curve = {"shares": [0.5, 1.0], "quality": [0.9, 1.0], "least_share": 0.5, "area": 0.7}
    part = {
        "origin": "customized",
        "unit": "bricks",
        "parts": 2,
        "items": 8,
        "scored": "response",
        "coupling": 0.25,
        "interval": [0.1, 0.5],
        "changes": [[2.0, 0.5], [0.1, 1.0]],
        "functions": [{"function": "a", "coupling": 0.25, "curve": curve}, {"function": "b", "coupling": None, "curve": None}],
        "curve": curve,
        "notes": ["the recipe is no better than its base on texts of 'b'"],
    }
    cosines = {
        "names": ["a", "b", "c"],
        "weight": [[1.0, 0.12, 0.0], [0.12, 1.0, None], [0.0, None, 1.0]],
        "function": {"tokens": 64, "mean": [[1.0, 0.54, -0.3], [0.54, 1.0, None], [-0.3, None, 1.0]]},
    }
    document = {"decompositions": [part], "cosines": cosines, "settings": {"kept": 0.9}}
    section = decomposition_section(document)
    assert section.lead[1] == (
        "The nearest bricks in function space are a and b (cosine 0.54, in weight space 0.12); against each other work a and c (−0.30)."
    )
    assert [row[2:] for row in section.rows] == [["0.25 [0.10, 0.50]", "50 %", "0.70"], ["0.25", "50 %", "0.70"], ["–", "–", "–"]]
    assert [table.title for table in section.tables] == [
        "One brick left out",
        "Cosine in weight space",
        "Cosine in function space",
    ]
    assert [cell.text for cell in section.tables[1].rows[1][1]] == ["0.12", "1.00", "–"]
    assert section.details[1].endswith("no better than its base on texts of 'b'.")
    plain = decomposition_section({**document, "decompositions": [], "cosines": {**cosines, "function": None}})
    assert plain.lead[1] == "The nearest bricks in weight space are a and b (cosine 0.12); no two bricks work against each other."


def test_what_merging_did_is_claimed_from_the_base_s_sets() -> None:
    def entry(model: str, kept: float, score: float, merged: float) -> dict[str, Any]:
        return {"model": model, "in_merge": kept, "in_base": 1.0, "score": score, "score_in_merge": merged, "top": score}

    document = {
        "models": [{"name": name} for name in ("base", "a-very-long-brick", "mix")],
        "functions": [
            {
                "function": "math",
                "models": [entry("base", 0.4, 0.5, 0.3), entry("a", 0.5, 0.6, 0.4), entry("mix", 1.0, 0.4, 0.4)],
            },
            {
                "function": "code",
                "models": [entry("base", 0.8, 0.5, 0.49), entry("a", 0.7, 0.6, 0.5), entry("mix", 1.0, 0.6, 0.6)],
            },
        ],
        "settings": {"share": 0.05},
        "data": {"file": "x.jsonl"},
    }
    section = beside_section(document)
    assert section.lead[1] == (
        "On average 60 % of a set of the base and 60 % of a set of a brick are in the merge's set too; least of the base for math (40 %). The "
        "sets of math score lower than in the base by more than 0.05."
    )
    assert section.rows[0] == ["math", "0.50 → 0.30", "0.60 → 0.40", "0.40"]
    assert "a-very-…" in str(section.charts[0].drawing)
    assert [[cell.text for cell in cells] for _, cells in section.tables[0].rows] == [["0.40", "0.50"], ["0.80", "0.70"]]

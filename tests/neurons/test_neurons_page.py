"""The page of a model's neurons says what the nulls and controls allow, and no more."""

from __future__ import annotations

from typing import Any

from worlds.neuron_results import TEXTS, damage, functions, made

from workbench.neurons.ablation import Ablation
from workbench.neurons.functions import FunctionsResult
from workbench.neurons.locate import KnowledgeResult
from workbench.neurons.pages.page import ablation_section, functions_sections, main_layers
from workbench.neurons.pages.questions import facts_section, partition_section
from workbench.neurons.partition import PartitionResult
from workbench.report.tints import CHANGES


def test_each_function_gets_a_verdict() -> None:
    verdicts, _, scores = functions_sections(functions({"math": 3, "code": 0, "law": None, "art": 2}))
    assert verdicts.lead == [
        "math: found. 3 neurons serve it, half of them in layer 7. Without its set, its perplexity changes by +50 %, more than without "
        "any of 3 random sets of equal activation (median +20 %).",
        "code: not found. An effect of 4.5 standard deviations would have been; the largest is 6.2. Without its set, its perplexity changes "
        "by +50 %, no more than without most of 3 random sets of equal activation (median +60 %).",
        "law: no power. With 2 tasks, no effect is large enough to be told from the wording of a task.",
        "art: found. 2 neurons serve it, half of them in layer 3. Without its set, its perplexity changes by +50 %, more than without "
        "most of 3 random sets of equal activation (median +40 %).",
        "Tasks of every function and the effects that they would show: from 3.8 with 6, from 2.5 with 12.",
    ]
    assert verdicts.rows[0] == ["math", "found", "4", "3", "7", "6.2", "4.5", "+50 [+25, +100] %", "+20 %"]
    assert verdicts.rows[2] == ["law", "no power", "2", "0", "–", "6.2", "–", "+50 [+25, +100] %", "+40 %"]
    assert verdicts.links["math"] == "math.html"
    assert scores.rows[0][1:4] == ["0.80 / 0.90", "0.50", "0.200"]


def test_half_of_the_neurons_are_in_the_smallest_range() -> None:
    assert main_layers({"2": 1, "5": 3, "6": 3, "9": 1}) == (5, 6)
    assert main_layers({"2": 5, "9": 1}) == (2, 2)
    assert main_layers({"4": 1, "6": 1, "11": 1}) == (4, 6)


def ablation(**changed: Any) -> FunctionsResult:
    """A result with this damage."""
    return functions({"math": 1, "code": 0}).model_copy(update={"ablation": Ablation.model_validate(damage(**changed))})


def test_ablations_stand_beside_their_matched_control() -> None:
    section = ablation_section(ablation())
    assert section.lead[1] == (
        "1 of 2 sets harm their own function most; not so those of code. Of random neurons with the same mean activation, 0 of 2 do."
    )
    assert [row[3] for row in section.rows] == ["", "1 of 2", "2 of 2"]
    own, matched, random = section.tables
    assert [[cell.text for cell in cells] for _, cells in own.rows] == [["200", "10"], ["300", "100"]]
    assert len(matched.rows) == 2
    assert [name for name, _ in random.rows] == ["all functions"]  # one set is the control of both


def test_damage_whose_interval_includes_zero_is_gray() -> None:
    changes = [[1.5, 0.3], [0.004, -0.2]]
    tested = ablation_section(
        ablation(changes=changes, low=[[1.0, -0.1], [0.001, -0.3]], high=[[2.0, 0.7], [0.008, None]])
    ).tables[0]
    assert [[c.kind for c in cells] for _, cells in tested.rows] == [["up", "null"], ["null", "null"]]
    assert tested.neutral == "the 95 % interval includes 0, or the change is below 1 %"
    assert tested.rows[0][1][0].tint == CHANGES.tint(150.0)


def facts(**changed: Any) -> KnowledgeResult:
    """A result of two facts, whose neurons are proved when they are suppressed."""
    change = {"own": -0.5, "random": -0.02, "others": 0.01, "drawn": [-0.02]}
    fact = {
        "fact": "f",
        "layers": {},
        "set": None,
        "prompt": "A is",
        "answer": " b",
        "probability": 0.25,
        "error": 0.01,
        "changes": {"suppressed": change},
    }
    mean = {"own": -0.5, "random": -0.02, "others": 0.01, "facts": 1, "difference": -0.48, "low": None, "high": None, "beyond": 1}
    document = {
        "facts": [
            {**fact, "neurons": [{"layer": 0, "neuron": 7, "score": 0.1}] * 4},
            {**fact, "neurons": [], "changes": {}, "error": changed.get("error", 0.0)},
        ],
        "unit": "neurons",
        "neurons": 4,
        "complete": 2 - ("error" in changed),
        "undone": False,
        "changes": {"suppressed": mean},
        "layers": {"0": 0.75, "1": 0.25},
        "settings": {"answer": "own"},
        **changed,
    }
    result: KnowledgeResult = made(KnowledgeResult, document)
    return result


def test_facts_stand_beside_random_neurons_and_the_sums() -> None:
    section = facts_section(facts())
    assert section.lead[1] == (
        "Suppressing a fact's neurons changes the probability of its answer by −50.0 % on average, random neurons change it by −2.0 %: a "
        "difference of −48.0 points over 1 fact. For 1 of them, the change exceeds that of every random draw; it changes the answers of other "
        "facts by +1.0 %."
    )
    assert section.lead[2] == "The attributions of 2 of 2 facts add up to the change of probability within 2 %."
    assert len(section.lead) == 3
    assert [row[3] for row in section.rows] == ["4: 0.7, 0.7, 0.7, …", "0"]
    assert [row[4:7] for row in section.rows] == [["−50 %", "−2 %", "+1 %"], ["–", "–", "–"]]
    assert len(section.charts) == 1


def point(used: float, captured: float, rise: float, half: float | None = 0.1) -> dict[str, Any]:
    ends = {"low": None, "high": None} if half is None else {"low": rise - half, "high": rise + half}
    return {"experts": int(used / 25), "used": used, "captured": captured, "loss": 3 + rise, "rise": rise, **ends}


def partition(**changed: Any) -> PartitionResult:
    document = {
        "partition": "d",
        "experts": 4,
        "sizes": {"0": 12, "1": 12},
        "shared": {"0": 1, "1": 2},
        "difference": 3e-7,
        "loss": 3.0,
        "data": {**TEXTS, "items": 1},
        "settings": {"method": "cmoe"},
        "curves": [
            {"selector": "oracle", "points": [point(75, 0.9, 0.05), point(50, 0.7, 0.5)]},
            {"selector": "ridge", "points": [point(75, 0.8, 0.2), point(50, 0.6, 1.0)]},
            {"selector": "centroid", "points": [point(75, 0.85, 0.3), point(50, 0.6, 0.75, None)]},
        ],
        **changed,
    }
    result: PartitionResult = made(PartitionResult, document)
    return result


def test_selectors_stand_beside_the_oracle() -> None:
    section = partition_section(partition())
    assert section.lead[0] == (
        "The neurons of every layer are divided into 4 experts of 12 neurons, as CMoE does (arXiv 2502.04416); 1 to 2 of the experts "
        "serve every token."
    )
    assert "at most 3e-07 of a layer's largest output" in section.lead[1]
    assert section.lead[2].startswith(
        "With 50 % of the neurons, the loss rises by 0.75 nats per token with the best selector (centroid), and by 0.50"
    )
    assert section.rows == [
        ["oracle", "90 %, 0.05 [−0.05, 0.15]", "70 %, 0.50 [0.40, 0.60]"],
        ["ridge", "80 %, 0.20 [0.10, 0.30]", "60 %, 1.00 [0.90, 1.10]"],
        ["centroid", "85 %, 0.30 [0.20, 0.40]", "60 %, 0.75"],
    ]
    assert len(section.charts) == 2
    assert "1 held-out text." in section.details[0]


def test_one_selector_and_one_share() -> None:
    section = partition_section(
        partition(curves=[{"selector": "oracle", "points": [point(75, 0.9, 0.05)]}], shared={"0": 0, "1": 0})
    )
    assert len(section.lead) == 2
    assert "; 0 of the experts serve every token." in section.lead[0]
    assert section.charts == []

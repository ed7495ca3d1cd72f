"""The section of experts on the page of a model's neurons."""

from __future__ import annotations

from typing import Any

from workbench.report.neurons_partition import partition_section


def point(used: float, captured: float, rise: float, half: float | None = 0.1) -> dict[str, Any]:
    ends = {"low": None, "high": None} if half is None else {"low": rise - half, "high": rise + half}
    return {"experts": int(used / 25), "used": used, "captured": captured, "loss": 3 + rise, "rise": rise, **ends}


def document(**changed: Any) -> dict[str, Any]:
    return {
        "experts": 4,
        "sizes": {"0": 12, "1": 12},
        "shared": {"0": 1, "1": 2},
        "difference": 3e-7,
        "loss": 3.0,
        "data": {"file": "x.jsonl", "items": 1},
        "settings": {"method": "cmoe"},
        "curves": [
            {"selector": "oracle", "points": [point(75, 0.9, 0.05), point(50, 0.7, 0.5)]},
            {"selector": "ridge", "points": [point(75, 0.8, 0.2), point(50, 0.6, 1.0)]},
            {"selector": "mlp", "points": [point(75, 0.85, 0.3), point(50, 0.6, 0.75, None)]},
        ],
        **changed,
    }


def test_selectors_stand_beside_the_oracle() -> None:
    section = partition_section(document())
    assert section.lead[0] == (
        "The neurons of every layer are divided into 4 experts of 12 neurons, as CMoE does (arXiv 2502.04416); 1 to 2 of the experts "
        "serve every token."
    )
    assert "at most 3e-07 of a layer's largest output" in section.lead[1]
    assert section.lead[2].startswith(
        "With 50 % of the neurons, the loss rises by 0.75 nats per token with the best selector (mlp), and by 0.50"
    )
    assert section.rows == [
        ["oracle", "90 %, 0.05 [−0.05, 0.15]", "70 %, 0.50 [0.40, 0.60]"],
        ["ridge", "80 %, 0.20 [0.10, 0.30]", "60 %, 1.00 [0.90, 1.10]"],
        ["mlp", "85 %, 0.30 [0.20, 0.40]", "60 %, 0.75"],
    ]
    assert len(section.charts) == 2
    assert "1 held-out text." in section.details[0]


def test_one_selector_and_one_share() -> None:
    section = partition_section(
        document(curves=[{"selector": "oracle", "points": [point(75, 0.9, 0.05)]}], shared={"0": 0, "1": 0})
    )
    assert len(section.lead) == 2
    assert "; 0 of the experts serve every token." in section.lead[0]
    assert section.charts == []

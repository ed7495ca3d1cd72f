"""Plans, runs and model cards say what pruning removed."""

from __future__ import annotations

import pytest

from worlds.commands import call
from worlds.project import Project
from worlds.texts import write_rows

from workbench.grow.expansion.wording import removal_line


def test_words_of_a_record() -> None:
    sizes = {"parameters": [134_500_000, 4_000], "bytes": [269_000_000, 8_000]}
    influence = {"by": "influence", "influence": [1.0, 0.02, 0.5, 0.01, 0.03, 0.6]}
    record = {"grow": "prune", "layers": [6, 3], "gone_layers": [1, 3, 4], "importance": influence, **sizes}
    assert removal_line(record) == (
        "6 -> 3 layers, removed 1, 3-4 (influence 0.01 to 0.03, the others 0.5 to 1); 134.5 million -> 4,000 parameters, "
        "269 MB -> 8.0 kB"
    )
    greedy = {"by": "perplexity", "removed": [3, 1], "losses": [2.0, 2.25, 2.5], "heads_kept_strength": [0.8, 0.95]}
    record = {"grow": "prune", "layers": [6, 4], "gone_layers": [1, 3], "key_value_heads": [3, 2], "importance": greedy, **sizes}
    assert removal_line(record) == (
        "6 -> 4 layers, removed 1, 3 (in the order 3, 1; loss 2 -> 2.5); 3 -> 2 key-value heads with 80 to 95 % of their importance; "
        "134.5 million -> 4,000 parameters, 269 MB -> 8.0 kB"
    )
    listed = {"grow": "prune", "layers": [6, 5], "gone_layers": [5], **sizes}
    assert str(removal_line(listed)).startswith("6 -> 5 layers, removed 5; 134.5 million")
    assert removal_line({"grow": "stack", **sizes}) is None


def test_plan_run_and_card(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.path)
    write_rows(project.path / "texts.jsonl", 6)
    project.write("steps: [{grow: prune, layers: 1, neurons: 0.25, calibration: texts.jsonl}]\n")
    sizes = "4 -> 3 layers; 48 -> 36 neurons a layer; "
    planned = call("plan", "recipes/test.yaml")
    assert f"grow-prune: {sizes}" in planned.output
    done = call("run", "recipes/test.yaml")
    assert "grow-prune: 4 -> 3 layers, removed " in done.output
    card = next((project.path / "runs").glob("*/model/README.md")).read_text("utf-8")
    assert "- `grow-prune`: 4 -> 3 layers, removed " in card
    assert "(influence " in card
    assert "shorter ones keep their other elements" in card


def test_the_plan_of_a_wider_model(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row has numbers of neurons, where those of edits have a set."""
    monkeypatch.chdir(project.path)
    project.write("steps: [{grow: width, neurons: 64}]\n")
    assert "check full" in call("plan", "recipes/test.yaml").output

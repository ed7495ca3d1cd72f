"""`analyze decompose` on a tiny recipe and on a tiny model: both on one scale, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from worlds.commands import call, document, refused
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import WORDS, live

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import losses
from workbench.neurons.bricks import live_float32

HEAD = "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\n"


def rows(functions: tuple[str, ...], response: str = "w1 w2") -> list[dict[str, Any]]:
    return [
        {
            "prompt": " ".join(f"w{20 * f + (7 * t + 3 * i + k) % 20}" for k in range(6)),
            "function": name,
            "task": f"{name}{t}",
            **({"response": response} if response else {}),
        }
        for f, name in enumerate(functions)
        for t in range(4)
        for i in range(3)
    ]


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.path)
    write_jsonl(project.path / "skills.jsonl", rows(("one", "three")))
    project.write(f"{HEAD}steps: [{{merge: task_arithmetic, bricks: {{one: 0.5, two: 1.0, three: 0.7}}}}]\n", "mix.yaml")
    return project


def loss_by_hand(project: Project, bricks: str, name: str) -> float:
    """The loss of the responses of a function's held-out texts on a recipe that is written by hand."""
    steps = f"[{{merge: task_arithmetic, bricks: {bricks}}}]" if bricks else "[]"
    model = live_float32(project.resolve(f"{HEAD}steps: {steps}\n", "by-hand.yaml"), CPU)
    chosen = [row for row in rows(("one", "three")) if row["function"] == name and row["task"][-1] in "13"]
    tokens = [[WORDS.index(w) for w in f"{row['prompt']} {row['response']}".split()] for row in chosen]
    found = losses(model, [ItemRow(t, 6) for t in tokens], scored="response")
    return float(found.sums.sum() / found.tokens.sum())


def test_a_recipe_s_bricks(world: Project) -> None:
    """Scores are losses of recipes that a user would write by hand, in the order of what leaving out costs."""
    found = document("analyze", "decompose", "recipes/mix.yaml", "--data", "skills.jsonl", "-o", "found", "--keep", "0.8")
    (part,) = found["decompositions"]
    assert (part["origin"], part["parts"], part["items"], part["scored"]) == ("customized", 3, 12, "response")
    weights = {"one": 0.5, "two": 1.0, "three": 0.7}

    def loss(kept: list[str], name: str) -> float:
        return loss_by_hand(
            world, "{" + ", ".join(f"{b}: {weights[b]}" for b in weights if b in kept) + "}" if kept else "", name
        )

    for row in part["functions"]:
        name = row["function"]
        costs = {brick: loss([b for b in weights if b != brick], name) for brick in weights}
        order = sorted(weights, key=lambda brick: -costs[brick])
        full, none = -loss(order, name), -loss([], name)
        curve = row["curve"]
        if full <= none:
            assert curve is None
            assert any(f"'{name}'" in note for note in part["notes"])
            continue
        assert curve["order"] == order
        assert curve["shares"] == pytest.approx([1 / 3, 2 / 3, 1])
        assert curve["floor"] == pytest.approx(none, abs=1e-5)
        expected = [(-loss(order[:k], name) - none) / (full - none) for k in (1, 2, 3)]
        assert curve["quality"] == pytest.approx(expected, abs=1e-2)
    assert any(row["curve"] for row in part["functions"]), "this world has a function that the recipe serves"
    assert found["cosines"]["names"] == ["one", "two", "three"]
    assert found["cosines"]["function"]["tokens"] == 12 * 7  # without first tokens
    page = (world.path / "found" / "index.html").read_text("utf-8")
    assert '<section id="decomposition">' in page
    assert json.loads((world.path / "found" / "decomposition.json").read_text("utf-8")) == found


def test_labels_of_cards_name_bricks(world: Project) -> None:
    """A text's function may be one that a single brick's card names; texts of other functions are left out and counted."""
    for brick in ("one", "three"):
        folder = world.path / "cards" / brick
        folder.mkdir(parents=True)
        for file in (world.path / "bricks" / brick).resolve().iterdir():
            (folder / file.name).symlink_to(file)
        card = {"version": 1, "name": brick, "kind": "adapter", "functions": [f"skill-{brick}"], "base": {"id": "base"}}
        (folder / "brick.yaml").write_text(yaml.safe_dump(card), "utf-8")
    world.write("bricks: {one: cards/one, three: cards/three}\nsteps: [{merge: average}]\n", "carded.yaml")
    write_jsonl(world.path / "labels.jsonl", rows(("skill-one", "skill-three", "law"), ""))
    result = call("analyze", "decompose", "recipes/carded.yaml", "--data", "labels.jsonl", "-o", "found")
    assert "12 texts of 'law' are left out" in result.stderr
    (part,) = json.loads((world.path / "found" / "decomposition.json").read_text("utf-8"))["decompositions"]
    assert [row["function"] for row in part["functions"]] == ["one", "three"]
    assert (part["scored"], part["items"]) == ("whole", 12)


def test_weights_alone_need_no_texts(world: Project) -> None:
    found = document("analyze", "decompose", "recipes/mix.yaml", "-o", "found")
    assert (found["data"], found["decompositions"], found["cosines"]["function"]) == (None, [], None)
    assert found["cosines"]["weight"][1][1] == 1
    assert "function space needs texts" in call("analyze", "decompose", "recipes/mix.yaml", "-o", "found").stderr


def test_neurons_stand_on_the_same_scale(world: Project) -> None:
    """Coupling is that of the ablation. The floor is the loss of the model with zeros in its output projections."""
    write_jsonl(world.path / "texts.jsonl", rows(("low", "high")))
    everything = document("analyze", "all", "base", "--data", "texts.jsonl", "-o", "found")
    found = document("analyze", "decompose", "base", "--data", "texts.jsonl", "-o", "found")
    (part,) = found["decompositions"]
    assert (part["origin"], part["parts"]) == ("emergent", sum(everything["functions"]["neurons"].values()))
    assert (part["coupling"], part["interval"]) == (everything["ablation"]["coupling"], everything["ablation"]["interval"])
    assert found["cosines"] is None
    model = live(world.path / "base")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    by_function = {row["function"]: row["curve"] for row in part["functions"]} | {None: part["curve"]}
    for name, curve in by_function.items():
        chosen = [row for row in rows(("low", "high")) if name in (None, row["function"]) and row["task"][-1] in "13"]
        tokens = [[WORDS.index(w) for w in f"{row['prompt']} {row['response']}".split()] for row in chosen]
        found_losses = losses(model, [ItemRow(t, 6) for t in tokens])
        masked = next(c for c in everything["sparsity"]["curves"] if (c["function"], c["indicator"]) == (name, "activation"))
        full, none = masked["points"][0]["loss"], found_losses.mean
        if none <= full:
            assert curve is None
            continue
        assert curve is not None
        assert curve["shares"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
        expected = [(none - point["loss"]) / (none - full) for point in reversed(masked["points"])]
        assert curve["quality"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert any(by_function.values()), "this world has a function that the neurons serve"
    without = document("analyze", "decompose", "base", "-o", "found")["decompositions"][0]
    assert without["notes"] == ["no curve: it needs the texts of `analyze sparsity` (--data texts.jsonl)"]


def test_bad_input(world: Project) -> None:
    error = refused("analyze", "decompose", "base", "-o", "found")
    assert error.message.startswith("llama has no bricks, and found has no analysis")
    world.write("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n", "single.yaml")
    assert "single has 1 brick, and" in refused("analyze", "decompose", "recipes/single.yaml").message
    write_jsonl(world.path / "others.jsonl", rows(("one", "law")))
    error = refused("analyze", "decompose", "recipes/mix.yaml", "--data", "others.jsonl")
    assert "serve fewer than two bricks of mix; their functions are one, law" in error.message
    assert "one, two, three" in (error.hint or "")
    assert "no such file" in refused("analyze", "decompose", "recipes/mix.yaml", "--data", "missing.jsonl").message
    assert not Path("runs", "neurons").exists()

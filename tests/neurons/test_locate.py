"""`analyze --facts` on a tiny model: its document, its sets and its page, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document, refused
from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import live

from workbench.bricks.neuron_sets import neuron_brick


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.path)
    write_jsonl(project.path / "facts.jsonl", facts())
    return project


def facts(count: int = 3) -> list[dict[str, Any]]:
    return [
        {"id": f"w{i}!" if i else "w0?", "prompt": "{subject} is", "subject": f"w{i} of w{i + 10}", "target": f"w{i + 30}"}
        for i in range(count)
    ]


def test_the_changes_are_those_of_zeroed_weights(world: Project) -> None:
    """Suppressing the saved neurons equals zeros in the inputs of the output projections at the prompt's last token."""
    found = document("analyze", "base", "--facts", "facts.jsonl", "-o", "found", "--answer", "target")["knowledge"]
    assert (found["model"], found["data"]["items"]) == ("llama", 3)
    assert json.loads((world.path / "found" / "knowledge.json").read_text("utf-8")) == found
    for fact, row in zip(found["facts"], facts(), strict=True):
        neurons, card = neuron_brick(world.path / "found" / fact["set"])
        assert card is not None
        assert (card.functions, card.base.digest) == (("knowledge",), found["digest"])
        assert neurons.size == len(fact["neurons"]) > 0
        assert neurons.evidence["answer"] == fact["answer"]
        assert fact["answer"].strip() == row["target"]
        for kind, factor in (("suppressed", 0.0), ("amplified", 2.0)):
            before, after = (probability(world.path / "base", row, neurons.indices, f) for f in (1.0, factor))
            assert fact["probability"] == pytest.approx(before, rel=1e-4)
            assert fact["changes"][kind]["own"] == pytest.approx(after / before - 1, rel=1e-3, abs=1e-5)
            drawn = fact["changes"][kind]["drawn"]
            assert fact["changes"][kind]["random"] == pytest.approx(sum(drawn) / 3)
    every, _ = neuron_brick(world.path / "found" / "knowledge" / "all")
    pairs = {(n["layer"], n["neuron"]) for fact in found["facts"] for n in fact["neurons"]}
    assert {(layer, int(i)) for layer, index in every.indices.items() for i in index} == pairs
    assert found["neurons"] == len(pairs)
    assert (world.path / "found" / "index.html").read_text("utf-8").count('<section id="knowledge">') == 1


def probability(folder: Path, row: dict[str, Any], indices: Any, factor: float) -> float:
    """The probability of a fact's target by a model with some neurons of the last token scaled."""
    from transformers import AutoTokenizer

    model, tokenizer = live(folder), AutoTokenizer.from_pretrained(folder)
    prompt = row["prompt"].replace("{subject}", row["subject"])
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    (answer,) = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for layer, index in indices.items():

            def scale(_module: Any, args: tuple[torch.Tensor], index: torch.Tensor = index) -> tuple[torch.Tensor]:
                changed = args[0].clone()
                changed[:, -1, index] *= factor
                return (changed,)

            model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(scale)
        return float(model(tokens).logits[0, -1].double().softmax(-1)[answer])


def test_facts_are_printed_with_the_model_s_own_answers(world: Project) -> None:
    """Ids that differ in signs alone get folders of their own."""
    result = call("analyze", "base", "--facts", "facts.jsonl", "-n", "2")
    assert "add up to the change of probability" in result.stdout
    assert "Suppressing a fact's neurons changes the probability of its answer by" in result.stdout
    folder = world.path / "runs" / "neurons" / "llama"
    assert sorted(p.name for p in (folder / "knowledge" / "facts").iterdir()) == ["w0", "w1"]
    write_jsonl(world.path / "facts.jsonl", [{**row, "id": f"a{'!' * i}"} for i, row in enumerate(facts(2))])
    call("analyze", "base", "--facts", "facts.jsonl", "-o", "signs")
    assert sorted(p.name for p in (world.path / "signs" / "knowledge" / "facts").iterdir()) == ["a", "a-2"]


def test_a_set_scales_in_a_recipe(world: Project) -> None:
    """The set of all facts is a brick of the base, which `edit: scale_neurons` takes."""
    found = document("analyze", "base", "--facts", "facts.jsonl", "-o", "found")["knowledge"]
    world.write("bricks: {}\nsteps: [{edit: scale_neurons, neurons: found/knowledge/all}]\n", "without.yaml")
    assert document("plan", "recipes/without.yaml")["steps"]
    shown = document("brick", "show", "found/knowledge/all")
    assert shown["neurons"]["size"] == found["neurons"]


def test_bad_input_is_refused_before_any_work(world: Project) -> None:
    assert "no such facts file" in refused("analyze", "base", "--facts", "missing.jsonl").message
    error = refused("analyze", "base", "--facts", "facts.jsonl", "--answer", "target_true")
    assert error.message == "facts.jsonl:1: the fact has no 'target_true'"
    world.write("bricks: {}\nsteps: [{edit: memory, facts: facts.jsonl, min_efficacy: 0}]\n", "remembers.yaml")
    assert "ends in a memory" in refused("analyze", "recipes/remembers.yaml", "--facts", "facts.jsonl").message
    write_jsonl(world.path / "empty.jsonl", [])
    assert "no facts" in refused("analyze", "base", "--facts", "empty.jsonl").message
    assert not Path("runs", "neurons").exists()

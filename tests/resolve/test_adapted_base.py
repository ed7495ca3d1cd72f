"""`base: {adapter:, on:}` in a recipe: the model with the adapter, beside PEFT; keys, records and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from worlds.project import Project
from worlds.tiny import baked, save_adapter, save_finetuned, save_model, tensors_of

from workbench.ground.errors import WorkbenchError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, its fine-tune one, and an adapter, in float32."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "base", dtype=torch.float32)
    save_finetuned(folder / "base", folder / "one", seed=1)
    save_adapter(folder / "base", folder / "lora", seed=5)
    return folder


@pytest.fixture
def several(tmp_path: Path, models: Path) -> Project:
    """A project with these models, and a recipe `mix` on base."""
    project = Project.of(tmp_path, models)
    project.write("bricks: {one: one}\nsteps: [{merge: task_arithmetic, lambda: 0.5}]\n", "mix.yaml")
    project.write("base: {adapter: lora, on: base}\nbricks: {one: one}\nsteps: [{merge: average}]\n", "adapted.yaml")
    return project


def test_a_base_with_an_adapter_is_what_peft_merges(several: Project, models: Path) -> None:
    text = "base: {adapter: lora, on: base}\nbricks: {one: one}\n"
    expected, one = baked(models / "base", models / "lora"), tensors_of(models / "one")
    plain = several.tensors(text + "name: plain\n")
    assert plain.keys() == expected.keys()
    assert all(torch.allclose(t, expected[n], atol=1e-6) for n, t in plain.items())
    merged = several.tensors(text + "steps: [{merge: task_arithmetic, lambda: 0.25}]\n")
    for name, tensor in merged.items():
        assert torch.allclose(tensor, expected[name] + 0.25 * (one[name] - expected[name]), atol=1e-6)
    done = several.run(text + "steps: [{merge: task_arithmetic, lambda: 0.25}]\n")
    assert all(torch.equal(t, merged[n]) for n, t in tensors_of(Path(done["model"])).items())
    record = json.loads((Path(done["run"]) / "run.json").read_text("utf-8"))
    assert record["inputs"]["base"]["id"] == "base+lora"
    assert "| base | base+lora |" in (Path(done["model"]) / "README.md").read_text("utf-8")


def test_the_adapter_of_the_base_is_part_of_every_key(several: Project, models: Path) -> None:
    save_adapter(models / "base", several.path / "lora2", seed=6)
    keys = {
        several.resolve(f"base: {base}\nbricks: {{one: one}}\nsteps: [{{merge: average}}]\n").key
        for base in ("base", "{adapter: lora, on: base}", "{adapter: lora2, on: base}")
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: {adapter: lora}\n", "base.on: required field is missing"),
        ("base: {adapter: lora, on: base, to: x}\n", "base.to: unknown field"),
        ("base: {adapter: one, on: base}\n", "one is a checkpoint, but the recipe says adapter"),
        ("base: {adapter: lora, on: gone}\n", "base: no such directory: gone"),
        (
            "base: {adapter: lora, on: base}\nbricks: {lora: lora}\nsteps: [{merge: average}]\noutput: {form: adapter}\n",
            "`form: adapter` refers to a base on disk, but this base has an adapter on it",
        ),
        (
            "base: {adapter: lora, on: base}\nbricks: {mix: {recipe: recipes/mix.yaml}}\nsteps: [{merge: average}]\n",
            "recipes/mix.yaml has the base base, but this recipe has base+lora",
        ),
        (
            "bricks: {mix: {recipe: recipes/adapted.yaml}}\nsteps: [{merge: average}]\n",
            "recipes/adapted.yaml has the base base+lora, but this recipe has base",
        ),
    ],
)
def test_bad_bases_with_adapters(text: str, message: str, several: Project) -> None:
    with pytest.raises(WorkbenchError) as caught:
        several.resolve(text)
    assert message in caught.value.message

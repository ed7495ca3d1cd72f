"""The recipes of docs/common-recipes.md: each is valid and runs on small models that stand in for those it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from worlds.commands import call
from worlds.project import Project
from worlds.search_world import lay_out
from worlds.tiny import save_adapter, save_model, tensors_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "common-recipes.md"
RECIPES = {
    str(yaml.safe_load(text)["name"]): text
    for text in re.findall(r"```yaml\n(version: 1\n.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
}
MODELS = ("base", "new-base", "instruct", "reasoning", "tuned-a", "tuned-b", "tuned-c")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 32 layers, and an adapter of the base."""
    folder = tmp_path_factory.mktemp("common")
    for seed, name in enumerate(MODELS):
        save_model(folder / name, seed=seed, layers=32, dtype=torch.float32)
    save_adapter(folder / "base", folder / "lora", seed=9)
    return folder


@pytest.fixture
def place(project: Project, models: Path, cwd: Path) -> Path:
    """A project with the models and a task `questions`, as the working directory."""
    lay_out(project)
    tasks = project.path / "evals" / "tasks"
    (tasks / "questions.yaml").write_text(
        (tasks / "pick.yaml").read_text("utf-8").replace("task: pick", "task: questions"), "utf-8"
    )
    (project.path / "models").symlink_to(models, target_is_directory=True)
    return project.path


def made(place: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a recipe's result."""
    (place / "recipes" / f"{name}.yaml").write_text(RECIPES[name], "utf-8")
    found: dict[str, Any] = json.loads(
        call("run", f"recipes/{name}.yaml", "--set", "output.dtype=float32", "--device", "cpu", "--json").stdout
    )
    return tensors_of(place / found["model"])


def test_the_page_has_its_recipes() -> None:
    assert sorted(RECIPES) == ["chat-vector", "deeper", "on-adapted", "short-reasoning", "soup", "stock", "window"]


def test_a_chat_vector_is_the_difference_of_two_models_on_a_third(place: Path, models: Path) -> None:
    new, inst, old = (tensors_of(models / name) for name in ("new-base", "instruct", "base"))
    for name, tensor in made(place, "chat-vector").items():
        torch.testing.assert_close(tensor, new[name] + (inst[name] - old[name]), atol=1e-6, rtol=1e-5)


def test_the_last_eight_checkpoints_are_averaged(place: Path, models: Path) -> None:
    """Of nine checkpoints; the weights are those of a decay as 1 - sqrt(x) over eight intervals."""
    seeds = [MODELS[i % len(MODELS)] for i in range(9)]
    for i, name in enumerate(seeds):
        (place / "out").mkdir(exist_ok=True)
        (place / "out" / f"checkpoint-{100 * (i + 1)}").symlink_to(models / name, target_is_directory=True)
    decay = [1 - (i / 8) ** 0.5 for i in range(9)]
    found, loaded = made(place, "window"), {name: tensors_of(models / name) for name in MODELS}
    for name in found:
        expected = sum((decay[i] - decay[i + 1]) * loaded[model][name] for i, model in enumerate(seeds[1:]))
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


def test_repeated_layers_are_damped(place: Path, models: Path) -> None:
    found, base = made(place, "deeper"), tensors_of(models / "base")
    depth = 1 + max(int(name.split(".")[2]) for name in found if ".layers." in name)
    assert depth == 48
    for part, factor in (("self_attn.o_proj", 0.5), ("mlp.down_proj", 0.5), ("mlp.up_proj", 1.0)):
        own = base[f"model.layers.8.{part}.weight"]
        assert torch.equal(found[f"model.layers.24.{part}.weight"], factor * own)
        assert torch.equal(found[f"model.layers.8.{part}.weight"], own)


@pytest.mark.parametrize("name", ["stock", "on-adapted"])
def test_a_recipe_changes_the_base(place: Path, models: Path, name: str) -> None:
    found, base = made(place, name), tensors_of(models / "base")
    assert found.keys() == base.keys()
    assert any(not torch.equal(tensor, base[key]) for key, tensor in found.items())


def test_the_sweep_has_three_points_and_the_search_is_valid(place: Path) -> None:
    for name in ("short-reasoning", "soup"):
        (place / "recipes" / f"{name}.yaml").write_text(RECIPES[name], "utf-8")
    assert len(json.loads(call("plan", "recipes/short-reasoning.yaml", "--device", "cpu", "--json").stdout)) == 3
    call("recipe", "check", "recipes/soup.yaml")

"""Every recipe of the project: valid, planned on the starter base, and starting with the command that runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.places import PROJECT

from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe

RECIPES = sorted([*(PROJECT / "recipes").glob("*.yaml"), *(PROJECT / "recipes" / "forget").glob("*.yaml")])
has_starter = pytest.mark.skipif(not (PROJECT / "bricks/starter/base/config.json").is_file(),
                                 reason="starter base not fetched: workbench brick fetch starter")  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_names_its_command(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    command = "search" if recipe.fields.search else "run"
    assert path.read_text("utf-8").startswith(f"# workbench {command} {path.relative_to(PROJECT).as_posix()}\n")
    assert recipe.fields.description
    assert recipe.fields.eval


@pytest.mark.starter
@has_starter
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_planned(path: Path, tmp_path: Path) -> None:
    from workbench.resolve.resolve import resolve
    from workbench.run.forms import brick_bytes
    from workbench.run.plan import plan

    if path.stem == "starter-mixed" and not (PROJECT / "bricks/reverse-full/checkpoint").is_dir():
        with pytest.raises(WorkbenchError, match="bricks/reverse-full is built on demand and is not trained yet"):
            resolve(load_recipe(path))
        return
    resolved = resolve(load_recipe(path))
    found = plan(resolved, tmp_path / "runs")
    steps = [step.to_dict() for step in found.steps]
    grown = sum(len(s.get("new_layers", [])) - len(s.get("gone_layers", [])) for s in steps)
    layer = 7_080_192  # bytes of one bf16 layer of the starter base
    experts = next((len(s["experts"]) for s in steps if "experts" in s), 0)  # the base's own, and more; and their router
    mixture = 30 * (experts - 1) * 3 * 2 * 576 * 1536 + 30 * experts * 2 * 576 if experts else 0
    words = 2 * 576 * sum(s.get("new_tokens", 0) for s in steps)
    neurons = next((step.neurons for step in resolved.recipe.fields.steps if step.name == "width"), 1536)
    wider = 30 * 3 * 2 * 576 * (neurons - 1536)
    beside = resolved.beside is not None and len(steps) == 1  # acts on the base as it is: nothing of it is written
    bricks = sum(brick_bytes(resolved, n) for n in resolved.parents) if resolved.recipe.router else 0
    assert found.write_bytes == bricks + (0 if beside else 269_030_016 + grown * layer + mixture + words + wider)
    assert found.problems == []
    assert resolved.warnings == (), "every brick was made on these weights"


@pytest.mark.starter
@has_starter
@pytest.mark.parametrize("card", sorted((PROJECT / "bricks").glob("*/brick.yaml")), ids=lambda p: p.parent.name)
@pytest.mark.part("upkeep")
def test_brick_is_what_its_card_says(card: Path) -> None:
    from workbench.bricks.card import read_card
    from workbench.bricks.locate import resolve_brick
    from workbench.steps.fields import BrickRef
    from workbench.upkeep.fetch import DIGEST

    found = read_card(card.parent)
    assert found.base.digest == DIGEST
    assert found.licence == "Apache-2.0"
    assert found.base.title == "SmolLM2-135M-Instruct, dequantised from Q4_1"
    if found.kind == "adapter" or (card.parent / found.files).is_dir():  # a full fine-tune is built on demand
        assert resolve_brick(found.name, BrickRef(brick=str(card.parent)), PROJECT).digest(None) == found.digest
    (score,) = found.scores
    assert score.n >= 200
    assert score.base_value is not None
    assert score.value >= 0.6
    assert score.base_value <= 0.4 * score.value

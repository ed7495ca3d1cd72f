"""Bricks of a recipe: each left out once, and their cosines in weight and function space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worlds.project import CPU, Project
from worlds.tiny import WORDS

from workbench.activations.labelled import Item, ItemRow
from workbench.activations.losses import losses
from workbench.errors import WorkbenchError
from workbench.models.texts import Text
from workbench.neurons.bricks import BrickSubsets, brick_cosines, live_float32, without_brick
from workbench.recipe.recipe import Recipe, load_recipe

THREE = """
bricks: {one: bricks/one, two: bricks/two, three: bricks/three}
steps:
- merge: task_arithmetic
  bricks: {one: 0.5, two: 1.0, three: {weight: 0.7}}
- merge: task_arithmetic
  bricks: {two: 0.1}
"""


def recipe_of(project: Project, text: str) -> Recipe:
    return load_recipe(project.write(text))


def test_without_a_brick(project: Project) -> None:
    """It leaves the recipe and every step; a step of this brick alone is gone; the other weights stay."""
    found = without_brick(recipe_of(project, THREE), "two")
    assert list(found.fields.bricks) == ["one", "three"]
    assert len(found.steps) == 1
    assert found.steps[0].names() == ["one", "three"]
    assert [found.steps[0].entry(n).weight for n in ("one", "three")] == [0.5, 0.7]  # type: ignore[attr-defined]
    assert found.name == "test-without-two"
    kept = without_brick(recipe_of(project, THREE), "one")
    assert [step.names() for step in kept.steps] == [["two", "three"], ["two"]]


def test_steps_that_list_no_bricks(project: Project) -> None:
    found = without_brick(
        recipe_of(project, "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\nsteps: [{merge: average}]\n"), "one"
    )
    assert found.steps[0].names() == ["two", "three"]
    with pytest.raises(WorkbenchError, match=r"recipe test has no brick 'four'.*") as error:
        without_brick(recipe_of(project, THREE), "four")
    assert error.value.hint == "Its bricks: one, two, three."


def items_of(names: list[str]) -> list[Item]:
    draw = np.random.default_rng(0)
    items = []
    for name in names:
        for n in range(4):
            words = " ".join(WORDS[i] for i in draw.integers(2, 60, 6))
            items.append(Item(f"{name}{n}", words, "", name, f"{name}{n % 2}", "heldout", ""))
    return items


def test_each_brick_left_out_once(project: Project) -> None:
    """The losses are those of recipes that a user would write by hand without the brick."""
    items = items_of(["three", "one"])
    table = BrickSubsets(recipe_of(project, THREE), items, device=CPU).table()
    assert table.functions == ["one", "three"]
    rows = [ItemRow([WORDS.index(word) for word in item.prompt.split()], 6) for item in items]
    head = "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\nsteps:\n- merge: task_arithmetic\n  bricks: "
    tail = "\n- merge: task_arithmetic\n  bricks: {two: 0.1}\n"
    by_hand = {"all": "{one: 0.5, two: 1.0, three: 0.7}", "one": "{two: 1.0, three: 0.7}", "three": "{one: 0.5, two: 1.0}"}
    found = {n: losses(live_float32(project.resolve(head + b + tail), CPU), rows).sums for n, b in by_hand.items()}
    own = {"one": slice(4, 8), "three": slice(0, 4)}
    for i, left_out in enumerate(own):
        for j, part in enumerate(own.values()):
            rise = (found[left_out][part].sum() - found["all"][part].sum()) / 20
            assert table.changes[i][j] == pytest.approx(float(rise.expm1()), abs=1e-5)


def test_texts_that_fit_no_brick(project: Project) -> None:
    with pytest.raises(WorkbenchError, match="texts have the function 'math', which is no brick of recipe test"):
        BrickSubsets(recipe_of(project, THREE), items_of(["one", "math"]), device=CPU)
    with pytest.raises(WorkbenchError, match="texts of at least two bricks of recipe test, found 1"):
        BrickSubsets(recipe_of(project, THREE), items_of(["one"]), device=CPU)


def texts(count: int) -> list[Text]:
    return [Text("", item.prompt, "") for item in items_of(["x"] * (count // 4))]


def test_cosines_of_a_recipe_s_bricks(project: Project) -> None:
    """A brick and its copy under another name have cosine 1 in both spaces; the third is unlike them."""
    text = "bricks: {one: bricks/one, copy: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\n"
    found = brick_cosines(recipe_of(project, text), texts(8), device=CPU)
    assert found.names == ["one", "copy", "two"]
    assert found.weight[0][1] == pytest.approx(1, abs=1e-5)
    assert found.function is not None
    assert abs(found.weight[0][2] or 1) < 0.3
    assert found.function.mean[0][1] == pytest.approx(1, abs=1e-4)
    assert (found.function.mean[0][2] or 1) < 0.9
    assert found.function.tokens == 8 * 5
    assert len(found.function.layers) == 4
    with pytest.raises(WorkbenchError, match="uses 1 bricks"):
        brick_cosines(recipe_of(project, "bricks: {one: bricks/one}\nsteps: [{merge: average}]\n"), texts(4), device=CPU)


def test_weights_beside_function(project: Project, tmp_path: Path) -> None:
    """The weight cosine is that of the deltas themselves."""
    from workbench.models.live import compute
    from workbench.run.compose import compose

    text = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\n"
    found = brick_cosines(recipe_of(project, text), texts(4), device=CPU)

    def flat(steps: str) -> torch.Tensor:
        resolved = project.resolve(f"bricks: {{one: bricks/one, two: bricks/two}}\nsteps: {steps}\n", "single.yaml")
        tensors: dict[str, Any] = compute(compose(resolved, CPU).model, torch.float32, CPU)
        return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])

    base, one, two = (
        flat(s) for s in ("[]", "[{merge: task_arithmetic, bricks: {one: 1}}]", "[{merge: task_arithmetic, bricks: {two: 1}}]")
    )
    expected = float(torch.nn.functional.cosine_similarity(one - base, two - base, dim=0))
    assert found.weight[0][1] == pytest.approx(expected, abs=1e-4)
    alone = brick_cosines(recipe_of(project, text), [], device=CPU)
    assert alone.function is None
    assert alone.weight == found.weight

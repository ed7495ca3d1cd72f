"""docs/architecture.md holds what the code holds: functions that exist, types on the arrows, formulas that give the methods' numbers."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

import pytest
import torch

from worlds.places import PROJECT
from worlds.project import Project

from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.preset import of_moments
from workbench.edit.closed_form.solver import solve

PAGE = (PROJECT / "docs" / "architecture.md").read_text("utf-8")
ARROWS = re.findall(r"^\| (.+?) \| `(workbench\.[\w.]+)` \| (.+?) \|", PAGE, re.MULTILINE)


def function(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("source", "dotted", "target"), ARROWS)
def test_an_arrow_is_a_function_between_its_boxes(source: str, dotted: str, target: str) -> None:
    signature = inspect.signature(function(dotted))
    if source.startswith("`"):
        assert any(source.strip("`") in str(p.annotation) for p in signature.parameters.values()), dotted
    if target.startswith("`"):
        assert target.strip("`") in str(signature.return_annotation), dotted


def test_every_box_of_the_figure_is_in_a_table() -> None:
    figure = (PROJECT / "docs" / "architecture.svg").read_text("utf-8")
    boxes = set(re.findall(r">([^<]+)</text>", figure)) - {dotted.rpartition(".")[2] for _, dotted, _ in ARROWS}
    classes = {name for source, _, target in ARROWS for name in re.findall(r"`(\w+)`", source + target)}
    assert boxes == classes | {"recipe.yaml", "run directory", "live model", "page"}
    assert len(boxes) == 12


def test_the_figure_has_an_arrow_for_each_row(build: ModuleType) -> None:
    figure = build.road_figure.figure(PAGE)
    assert figure == (PROJECT / "docs" / "architecture.svg").read_text("utf-8")
    assert figure.count("<line ") == len(ARROWS) + 1  # the live model is scored, which no function of its own does
    for _, dotted, _ in ARROWS:
        assert f">{dotted.rpartition('.')[2]}</text>" in figure


def blocks() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    return names


def test_the_reference_form_of_ties_gives_its_numbers(project: Project) -> None:
    bricks = "bricks: {one: bricks/one, two: bricks/two, full: bricks/full}\n"
    base = project.tensors("")
    models = [project.tensors(f"{bricks}steps: [{{merge: task_arithmetic, bricks: {{{n}: 1}}}}]") for n in ("one", "two", "full")]
    found = project.tensors(f"{bricks}steps: [{{merge: ties, bricks: {{one: 1, two: 0.5, full: 2}}, density: 0.3, lambda: 0.7}}]")
    for name, start in base.items():
        if start.dim() == 2:
            expected = blocks()["ties"](start, [m[name] for m in models], [1.0, 0.5, 2.0], 0.3, 0.7)
            different = ~torch.isclose(found[name], expected, rtol=1e-4, atol=1e-5)
            assert different.float().mean() < 1e-3, name  # elements whose magnitude ties with the threshold in float32


def test_the_reference_form_of_rome_gives_its_numbers() -> None:
    torch.manual_seed(0)
    keys, changes, text = torch.randn(12, 3).double(), torch.randn(5, 3).double(), torch.randn(200, 12).double()
    second = text.T @ text / len(text)
    values, vectors = torch.linalg.eigh(second)
    metric = of_moments(Moments(vectors, values, len(text), {}), 1.0, 0.0)
    left, right = solve(keys.T, metric, 0.0).update(changes.T)
    torch.testing.assert_close(left @ right, blocks()["rome"](keys, changes, second), rtol=1e-9, atol=1e-9)

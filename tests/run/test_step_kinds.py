"""A kind of step that the workbench does not have: a file in steps/, one in run/kinds/, the first method, and no other file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from worlds.project import Project

import workbench
import workbench.run.kinds
import workbench.steps
from workbench.ground.errors import WorkbenchError
from workbench.recipe import methods, schema
from workbench.run.plan import plan
from workbench.steps.step import REGISTERED, VERBS

FILES = {
    "steps/scale.py": '''
from typing import Any, ClassVar
from workbench.steps.step import KeyContext, Step

class ScaleMethod(Step):
    """Multiply weights by a number."""
    kind = "scale"
    verb = "scale"

    def factor(self, tensor: str) -> float:
        raise NotImplementedError

    def key_parts(self, context: KeyContext) -> list[Any]:
        return [context.files(self.inputs())]
''',
    "run/kinds/scale.py": """
from workbench.models.layout import Model
from workbench.run.kind import Kind, StepResult
from workbench.steps.scale import ScaleMethod

class Scaled:
    def __init__(self, step, current):
        self.step, self.current, self.specs = step, current, current.specs
    def origin(self, name):
        return self.current.origin(name)
    def open(self, name, device):
        return Source(self.current.open(name, device), self.step.factor(name))

class Source:
    def __init__(self, source, factor):
        self.source, self.factor = source, factor
    def read(self, start, stop, out):
        self.source.read(start, stop, out)
        out.mul_(self.factor)

class Scale(Kind[ScaleMethod]):
    def plan_row(self, step, resolved, number, model, needs):
        needs.seconds += 1
        return {"scales": len(model.weights.specs)}, model
    def apply(self, step, context, current, earlier):
        names = [name for name in current.weights.specs if step.factor(name) != 1]
        return StepResult(Model(Scaled(step, current.weights), current.config), {"tensors": len(names)}, names)
    def check(self, step, context):
        return {"before": len(context.model_before().weights.specs)}

KIND = Scale()
""",
    "scale/__init__.py": '''
from typing import Literal
from workbench.steps import register
from workbench.steps.scale import ScaleMethod

@register
class Norms(ScaleMethod):
    """Multiply the norms."""
    scale: Literal["norms"]
    by: float
    """The number."""

    def factor(self, tensor: str) -> float:
        return self.by if "norm" in tensor else 1.0
''',
}


@pytest.fixture
def scale_kind(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files, found where the package's own are."""
    top = tmp_path_factory.mktemp("kind")
    for name, text in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text, "utf-8")
    methods.methods()
    known = dict(REGISTERED)
    for package, folder in ((workbench, ""), (workbench.steps, "steps"), (workbench.run.kinds, "run/kinds")):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(top / folder)])
    caches = (methods.methods.cache_clear, schema.recipe_model.cache_clear)
    for clear in caches:
        clear()
    yield
    VERBS.remove("scale")
    REGISTERED.clear()
    REGISTERED.update(known)
    for name in ("workbench.steps.scale", "workbench.run.kinds.scale", "workbench.scale"):
        sys.modules.pop(name, None)
    for package in (workbench, workbench.steps, workbench.run.kinds):
        vars(package).pop("scale", None)
    for clear in caches:
        clear()


STEPS = "bricks: {one: bricks/one}\nsteps: [{merge: average}, {id: norms, scale: norms, by: 2}, {grow: depth, blocks: 1}]\n"


@pytest.mark.usefixtures("scale_kind")
def test_a_new_kind_is_planned_keyed_checked_and_applied(project: Project) -> None:
    resolved = project.resolve(STEPS)
    assert plan(resolved, project.path / "runs").steps[1].to_dict() == {"id": "norms", "scale": "norms", "scales": 38}
    document = project.run(STEPS)
    assert document["steps"][1] == {
        "id": "norms",
        "scale": "norms",
        "tensors": 9,
        "key": resolved.keys[1],
        "check": {"before": 38},
    }
    merged = project.tensors("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n")
    scaled = project.tensors("bricks: {one: bricks/one}\nsteps: [{merge: average}, {scale: norms, by: 2}]\n")
    for name, tensor in merged.items():
        torch.testing.assert_close(scaled[name], tensor * (2 if "norm" in name else 1), rtol=0, atol=0)
    assert project.resolve(STEPS.replace("by: 2", "by: 3")).keys[1] != resolved.keys[1]


@pytest.mark.usefixtures("scale_kind")
def test_its_errors_are_those_of_any_step(project: Project) -> None:
    with pytest.raises(WorkbenchError, match=r"expected exactly one of merge, edit, grow, fuse, route, scale"):
        project.resolve("steps: [{shrink: all}]\n")
    with pytest.raises(WorkbenchError, match=r"unknown scale method 'norm'"):
        project.resolve("steps: [{scale: norm, by: 2}]\n")
    with pytest.raises(WorkbenchError, match=r"by"):
        project.resolve("steps: [{scale: norms}]\n")


def test_without_its_files_the_kind_is_unknown(project: Project) -> None:
    with pytest.raises(WorkbenchError, match=r"expected exactly one of merge, edit, grow, fuse, route;"):
        project.resolve("steps: [{scale: norms, by: 2}]\n")
    assert not Path(workbench.steps.__path__[0], "scale.py").exists()

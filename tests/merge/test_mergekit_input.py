"""`merge: mergekit/NAME`: bad parameters named before any work, a missing mergekit, imports on use only."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from worlds.project import Project

import workbench.merge.mergekit.table as api
from workbench.ground.errors import WorkbenchError
from workbench.merge.mergekit.methods import METHODS, Bridge


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge: mergekit/dela", "unknown merge method 'mergekit/dela'. Did you mean 'mergekit/della'"),
        ("merge: mergekit/della\nbricks: {one: 1}\nparameters: {dencity: 0.5}",
         ":9:18 steps.0.parameters.dencity: unknown field. Did you mean 'density'?"),
        ("merge: mergekit/della\nbricks: {one: {weight: 1, epsilom: 0.1}}", ":8:31 steps.0.bricks.one.epsilom: unknown field. Did you mean 'epsilon'?"),
        ("merge: mergekit/della\nbricks: {one: {weight: 1, lambda: 0.1}}", "lambda applies to all bricks: write it under `parameters`"),
        ("merge: mergekit/ties\nbricks: {one: 1}\nparameters: {density: 1.7}", "steps.0.parameters.density: expected a number between 0 and 1, found 1.7"),
        ("merge: mergekit/ties\nbricks: {one: {weight: 1, density: {first: 0, last: 2}}}", "expected a number between 0 and 1, found 2"),
        ("merge: mergekit/ties\nbricks: {one: 1}\nparameters: {normalize: 1}", "parameters.normalize: expected true or false, found 1"),
        ("merge: mergekit/ties\nbricks: {one: 1}\nparameters: {density: yes}", "parameters.density: expected a number, found true"),
        ("merge: mergekit/ties\nbricks: {one: 1}\nparameters: {density: a}", "parameters.density: expected a valid number, found 'a'"),
        ("merge: mergekit/karcher\nparameters: {max_iter: 1.5}", "parameters.max_iter: expected a whole number, found 1.5"),
        ("merge: mergekit/karcher\nbricks: {one: 0.5, two: 0.5}", "steps.0.bricks.one.weight: unknown field"),
        ("merge: mergekit/slerp\nbricks: [one]", "mergekit/slerp requires t: parameters: {t: 0.5}"),
        ("merge: mergekit/slerp\nbricks: [one, two]\nparameters: {t: 0.5}", "steps.0.bricks: mergekit/slerp takes exactly 1 bricks, found 2 (one, two)"),
        ("merge: mergekit/nearswap\nparameters: {t: 0.5}", "mergekit/nearswap takes exactly 1 bricks, found 2"),
        ("merge: mergekit/model_stock\nbricks: [one]", "mergekit/model_stock takes at least 2 bricks, found 1"),
        ("merge: mergekit/nuslerp\nbricks: {one: 1}", "mergekit/nuslerp takes exactly 2 bricks, found 1"),
        ("merge: mergekit/passthrough", "mergekit/passthrough takes exactly 1 bricks, found 2"),
        ("merge: mergekit/ties\nbricks: {one: 1}\nwith_base: false", "with_base: `with_base` does not apply to mergekit/ties, whose base is required"),
        ("merge: mergekit/della\nbricks: {one: 1}\nparameters: {density: 0.9}", "expected density ± epsilon between 0 and 1, found 0.9 ± 0.15"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named_before_any_work(text: str, message: str, project: Project) -> None:
    from workbench.recipe.recipe import load_recipe

    step = text.replace("\n", "\n    ")
    path = project.write(f"base: base\nbricks:\n  one: bricks/one\n  two: bricks/two\nsteps:\n  - {step}\n")
    with pytest.raises(WorkbenchError) as caught:
        load_recipe(path)
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_what_only_a_tensor_shows_is_named_with_it(project: Project) -> None:
    def fails(step: str) -> str:
        with pytest.raises(WorkbenchError) as caught:
            project.tensors(f"bricks: {{one: bricks/full, two: bricks/full}}\nsteps:\n  - {step}\n")
        return caught.value.message

    told = fails("{merge: mergekit/della, parameters: {weight: 1, density: {first: 0.5, last: 0.95}}}")
    assert "mergekit/della: brick one at " in told
    assert "expected density ± epsilon between 0 and 1" in told
    told = fails("{merge: mergekit/linear, bricks: {one: 1, two: -1}}")
    assert "mergekit/linear: the result contains NaN or infinity at model." in told


def test_a_brick_without_a_weight_has_weight_one(project: Project) -> None:
    """The weight is 1 as in every merge: in a list, beside other parameters, and where no rule of a schedule matches."""

    def made(step: str) -> dict[str, torch.Tensor]:
        return project.tensors(f"bricks: {{one: bricks/one, two: bricks/two}}\nsteps:\n  - {step}\n")

    expected = made("{merge: mergekit/ties, parameters: {weight: 1, density: 0.5}}")
    for step in (
        "{merge: mergekit/ties, parameters: {density: 0.5}}",
        "{merge: mergekit/ties, bricks: {one: {density: 0.5}, two: {density: 0.5}}}",
        '{merge: mergekit/ties, parameters: {density: 0.5, weight: [{where: {include: ["*mlp*"]}, value: 1}]}}',
    ):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in made(step).items()), step


@pytest.mark.parametrize(
    ("found", "message"),
    [("not installed", "mergekit, which is not installed"), ("0.2.0", "needs mergekit >=0.1.5,<0.2; found 0.2.0"), ("0.1.4", "found 0.1.4")],
)  # fmt: skip
def test_without_mergekit_the_command_that_installs_it(found: str, message: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(api, "installed", lambda name: {name: found})
    api.method.cache_clear()
    api.parameters.cache_clear()
    try:
        with pytest.raises(WorkbenchError, match=message) as caught:
            project.resolve("bricks: {one: bricks/full}\nsteps:\n  - {merge: mergekit/ram}\n")
        assert "pip install 'mergekit>=0.1.5,<0.2'" in caught.value.message
        project.resolve("bricks: {one: bricks/full}\nsteps:\n  - {merge: average}\n")
    finally:
        api.method.cache_clear()
        api.parameters.cache_clear()


def test_keys_depend_on_mergekits_version_and_see_what_a_brick_says(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "bricks: {one: bricks/full}\nsteps:\n  - {merge: mergekit/ram}\n"
    key = project.resolve(text).key
    assert METHODS["ram"].version == api.version_number()
    monkeypatch.setattr(METHODS["ram"], "version", METHODS["ram"].version + 1)
    assert project.resolve(text).key != key

    def text(density: str) -> str:
        return f"base: base\nbricks: {{one: bricks/full}}\nsteps:\n  - merge: mergekit/ties\n    bricks: {{one: {{weight: 1, density: {density}}}}}\n"

    assert project.resolve(text("0.5")).key != project.resolve(text("0.25")).key
    with pytest.raises(
        WorkbenchError, match=r"steps\.0\.bricks\.one\.density\.0\.where: include '\*nothing\*' matches no tensor"
    ):
        project.resolve(text('[{where: {include: ["*nothing*"]}, value: 0.5}]'))


def test_mergekit_is_imported_on_use_only(project: Project) -> None:
    plain = project.write("bricks: {one: bricks/full}\nsteps:\n  - {merge: average}\n", "plain.yaml")
    bridged = project.write("bricks: {one: bricks/full}\nsteps:\n  - {merge: mergekit/ram}\n", "bridged.yaml")
    code = f"""
import sys
from workbench.recipe.recipe import load_recipe
from workbench.recipe.schema import recipe_schema
from workbench.recipe.describe import describe
from workbench.recipe.methods import methods
from workbench.resolve.resolve import resolve
assert 'mergekit/della' in [describe(m).name for m in methods().values()] and recipe_schema()
resolve(load_recipe({str(plain)!r}))
assert 'mergekit' not in sys.modules
load_recipe({str(bridged)!r})
assert 'mergekit' in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_from_the_command_line(project: Project) -> None:
    from workbench.recipe.recipe import load_recipe

    path = project.write(
        "base: base\nbricks: {one: bricks/full}\nsteps:\n  - {id: mix, merge: mergekit/ties, bricks: {one: 1}}\n"
    )
    (step,) = load_recipe(path, ["mix.parameters.density=0.3", "mix.bricks.one=0.5"]).steps
    assert isinstance(step, Bridge)
    assert (step.parameters, step.bricks) == ({"density": 0.3}, {"one": 0.5})
    with pytest.raises(WorkbenchError, match=r"expected a number between 0 and 1, found 3"):
        load_recipe(path, ["0.parameters.density=3"])


def test_the_bridge_is_one_class_a_name() -> None:
    assert all(issubclass(cls, Bridge) and cls.name == f"mergekit/{name}" for name, cls in METHODS.items())
    assert "density* (1)" in (METHODS["della"].__doc__ or "")

"""Extras: without their libraries the core works, and a command that needs one says which extra to install."""

from __future__ import annotations

import importlib
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from worlds.commands import call
from worlds.places import PROJECT
from worlds.processes import in_one_process
from worlds.project import Project
from worlds.search_world import RECIPE, SPACE, lay_out, searched

from workbench.console.failures import command_of, extras, missing_extra

MODULES = [module for modules in extras().values() for module in modules]


@pytest.fixture
def world(project: Project) -> Project:
    """A project with a merge, an edit, growth, a suite and a search."""
    lay_out(project, items=8, clusters=4)
    project.write(RECIPE, "mix.yaml")
    project.write(searched(SPACE), "tuned.yaml")
    (project.path / "facts.jsonl").write_text('{"prompt": "{subject} is", "subject": "w3", "target": "w4"}\n', "utf-8")
    project.write("bricks: {}\nsteps: [{edit: finetune, facts: facts.jsonl, epochs: 2, min_efficacy: 0}]\n", "edited.yaml")
    project.write("bricks: {}\nsteps: [{grow: depth, blocks: 1}]\n", "grown.yaml")
    return project


def test_without_extras_models_are_made_and_stored_scores_reported(world: Project, cwd: Path) -> None:
    """And a command that needs an extra names it: all in one process."""
    call("eval", "mix")
    works = [
        "methods",
        "recipe check mix",
        "plan mix",
        "run mix",
        "run edited",
        "run grown",
        "runs ls",
        "doctor",
        "suite ls",
        "report mix -o page.html",
        "compare mix",
        "scores ls",
    ]
    refused = {
        "eval": "eval grown --suite words",
        "suite check": "suite check words --base base",
        "scores export": "scores export copy",
        "view": "view --no-browser",
    }
    libraries = {"view": "starlette and uvicorn, which are not installed: pip install 'brick-workbench[view]'"}
    commands = [[*words.split(), *(["--device", "cpu"] if words.startswith("run ") else [])] for words in works]
    ended = in_one_process([*commands, *(words.split() for words in refused.values())], world.path, missing=MODULES)
    for done, _ in ended[: len(works)]:
        assert done.returncode == 0, f"workbench {done.args}\n{done.stdout}{done.stderr}"
    assert "mix" in (world.path / "page.html").read_text("utf-8")
    for command, (done, _) in zip(refused, ended[len(works) :], strict=True):
        needed = libraries.get(command, "lm-eval and datasets, which are not installed: pip install 'brick-workbench[eval]'")
        assert done.returncode == 1, done.stderr
        assert f"error: `workbench {command}` needs {needed}" in done.stderr
        assert done.stderr.count("error:") == 1
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("extra", "missing", "names"),
    [("eval", {"lm_eval"}, "lm-eval, which is"), ("eval", {"datasets"}, "datasets, which is"), pytest.param("search", {"optuna", "cmaes"}, "optuna and cmaes, which are", marks=pytest.mark.part("search"))],
)  # fmt: skip
def test_libraries_of_an_extra_may_be_missing(extra: str, missing: set[str], names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(max(missing))
    message = f"`workbench a` needs {names} not installed: pip install 'brick-workbench[{extra}]'"
    assert str(missing_extra(caught.value, "workbench a")) == message


def test_other_missing_modules_are_bugs() -> None:
    assert missing_extra(ModuleNotFoundError("No module named 'safetensors'", name="safetensors"), "workbench run") is None
    assert missing_extra(ImportError("cannot import name 'x' from 'optuna'", name="optuna"), "workbench search") is None
    installed = ModuleNotFoundError("No module named 'lm_eval.removed'", name="lm_eval.removed")
    assert missing_extra(installed, "workbench eval") is None


def test_commands_are_named_without_their_arguments() -> None:
    assert command_of(["eval", "recipes/mix.yaml", "--limit", "4"], ["brick"]) == "workbench eval"
    assert command_of(["brick", "train", "add"], ["brick"]) == "workbench brick train"
    assert command_of(["--help"], ["brick"]) == "workbench"


@pytest.mark.part("search", "view")
def test_the_table_of_extras_is_that_of_pyproject() -> None:
    """The command line's table names the extras and distributions that pyproject.toml declares, each for its module."""
    optional = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    providers = packages_distributions()
    for extra, modules in extras().items():
        listed = " ".join(optional[extra]).lower().replace("_", "-")
        for module, distribution in modules.items():
            assert distribution in listed, f"{extra}: {distribution}"
            found = [name.lower().replace("_", "-") for name in providers.get(module, [distribution])]
            assert found == [distribution], module
    everything = {extra for extra in optional if extra not in ("all", "dev")}
    assert everything == extras().keys()
    assert optional["all"] == [f"brick-workbench[{','.join(e for e in optional if e in everything)}]"]

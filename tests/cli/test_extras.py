"""Extras: without their libraries the core works, and a command that needs one says which extra to install."""

from __future__ import annotations

import tomllib
from importlib.metadata import packages_distributions

import pytest

from worlds.places import PROJECT
from worlds.processes import workbench
from worlds.project import Project
from worlds.search_world import RECIPE, SPACE, lay_out, searched

from workbench.cli._failures import EXTRAS, command_of, missing_extra

MODULES = [module for modules in EXTRAS.values() for module in modules]


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


def test_without_extras_models_are_merged_edited_and_grown(world: Project) -> None:
    for command in (
        "methods",
        "recipe check mix",
        "plan mix",
        "run mix",
        "run edited",
        "run grown",
        "runs ls",
        "doctor",
        "suite ls",
    ):
        device = ["--device", "cpu"] if command.startswith("run ") else []
        done, _ = workbench(*command.split(), *device, cwd=world.path, missing=MODULES)
        assert done.returncode == 0, f"workbench {command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "eval mix",
            "`workbench eval` needs lm-eval and datasets, which are not installed: pip install 'brick-workbench[eval]'",
        ),
        (
            "suite check words --base base",
            "`workbench suite check` needs lm-eval and datasets, which are not installed: pip install 'brick-workbench[eval]'",
        ),
        (
            "scores export copy",
            "`workbench scores export` needs lm-eval and datasets, which are not installed: pip install 'brick-workbench[eval]'",
        ),
        (
            "search tuned",
            "`workbench search` needs optuna and cmaes, which are not installed: pip install 'brick-workbench[search]'",
        ),
    ],
)
def test_a_command_names_the_extra_that_it_needs(world: Project, command: str, message: str) -> None:
    missing = [m for m in MODULES if not (command == "search tuned" and m in EXTRAS["eval"])]
    done, _ = workbench(*command.split(), cwd=world.path, missing=missing)
    assert done.returncode == 1, done.stderr
    assert f"error: {message}" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def test_one_library_of_an_extra_may_be_missing(world: Project) -> None:
    for module, name in EXTRAS["eval"].items():
        done, _ = workbench("eval", "mix", cwd=world.path, missing=[module])
        assert f"error: `workbench eval` needs {name}, which is not installed: " in done.stderr
        assert done.returncode == 1


def test_other_missing_modules_are_bugs() -> None:
    assert missing_extra(ModuleNotFoundError("No module named 'safetensors'", name="safetensors"), "workbench run") is None
    assert missing_extra(ImportError("cannot import name 'x' from 'optuna'", name="optuna"), "workbench search") is None
    installed = ModuleNotFoundError("No module named 'lm_eval.removed'", name="lm_eval.removed")
    assert missing_extra(installed, "workbench eval") is None


def test_commands_are_named_without_their_arguments() -> None:
    assert command_of(["eval", "recipes/mix.yaml", "--limit", "4"], ["brick"]) == "workbench eval"
    assert command_of(["brick", "train", "add"], ["brick"]) == "workbench brick train"
    assert command_of(["--help"], ["brick"]) == "workbench"


def test_the_table_of_extras_is_that_of_pyproject() -> None:
    """The command line's table names the extras and distributions that pyproject.toml declares, each for its module."""
    optional = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    providers = packages_distributions()
    for extra, modules in EXTRAS.items():
        listed = " ".join(optional[extra]).lower().replace("_", "-")
        for module, distribution in modules.items():
            assert distribution in listed, f"{extra}: {distribution}"
            found = [name.lower().replace("_", "-") for name in providers.get(module, [distribution])]
            assert found == [distribution], module
    everything = {extra for extra in optional if extra not in ("all", "dev")}
    assert everything == EXTRAS.keys()
    assert optional["all"] == [f"brick-workbench[{','.join(e for e in optional if e in everything)}]"]

"""Warnings of commands: each once, and all of them in the document of `--json`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from worlds.commands import call, document
from worlds.project import Project
from worlds.tiny import edit_json

from workbench.console.output import Terminal
from workbench.ground.results import JsonObject
from workbench.resolve import resolve as resolving

TEXT = "bricks: {one: own}\nsteps: [{merge: task_arithmetic}]\n"


class Bare(JsonObject):
    """A document without warnings of its own."""

    name: str


class Warned(JsonObject):
    """A document with warnings of its own."""

    warnings: list[str]


@pytest.fixture
def unnamed(project: Project, cwd: None) -> Project:
    """A project with a brick that names another base, and the recipe `test` that merges it."""
    own = Path(shutil.copytree(project.path / "bricks/one", project.path / "own", ignore=lambda *_: ["README.md"]))
    edit_json(own / "adapter_config.json", base_model_name_or_path="org/other-1b")
    project.write(TEXT)
    return project


def printed(one: JsonObject | list[JsonObject], said: list[str], capsys: pytest.CaptureFixture[str]) -> object:
    terminal = Terminal()
    terminal.quiet = True
    for text in said:
        terminal.warn(text)
    terminal.result(lambda: one, lambda: None, json=True, warnings=["after"])
    found = capsys.readouterr()
    assert found.err == ""
    return json.loads(found.out)


def test_a_document_has_the_warnings_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(Bare(name="a"), ["b", "b"], capsys) == {"name": "a", "warnings": ["b", "after"]}
    assert printed(Warned(warnings=["own", "b"]), ["b", "c"], capsys) == {"warnings": ["own", "b", "c", "after"]}
    rows: list[JsonObject] = [Bare(name="a"), Warned(warnings=[])]
    assert printed(rows, ["b"], capsys) == [{"name": "a"}, {"warnings": ["b", "after"]}], "a row keeps its fields"


def test_a_warning_is_printed_once_a_command_and_again_by_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for _ in range(2):
        terminal.warn("twice")
    terminal.begin()
    terminal.warn("twice")
    assert capsys.readouterr().err.count("twice") == 2


def test_a_warning_of_the_inputs_is_kept_once(unnamed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "edit_warnings", lambda *_: ["same", "same"])
    assert unnamed.resolve(TEXT).warnings.count("same") == 1


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_documents_of_plan_and_run_have_what_they_print(unnamed: Project, command: str) -> None:
    said = call(command, "test").stderr
    found = document(command, "test")["warnings"]
    assert any("org/other-1b" in text for text in found)
    for text in found:
        assert said.count(text) == 1, said
    assert said.count("warning: ") == len(found)


def test_the_points_of_a_sweep_have_their_own_warnings(unnamed: Project) -> None:
    unnamed.write("bricks: {one: own, two: bricks/two}\nsteps: [{merge: task_arithmetic}]\nsweep: {0.bricks: [[one], [two]]}\n")
    said = call("plan", "test").stderr
    plans = document("plan", "test")
    assert all(plan["warnings"] for plan in plans)
    assert said.count("warning: ") == len({text for plan in plans for text in plan["warnings"]})


def test_a_plugin_that_cannot_be_read_is_in_the_document_of_methods(
    project: Project, cwd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.path / "methods").mkdir()
    (project.path / "methods/broken.py").write_text("import nowhere_at_all\n", "utf-8")
    monkeypatch.setenv("WORKBENCH_TRUST_PROJECT_CODE", "1")
    found = document("methods", "ties")
    assert found["name"] == "ties"
    assert any("broken" in text for text in found["warnings"])

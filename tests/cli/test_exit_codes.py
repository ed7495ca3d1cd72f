"""The exit status of each kind of outcome, as docs/commands.md promises it: `python -m workbench` in this process, one row a kind."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from worlds.places import PROJECT
from worlds.project import Project
from worlds.tiny import edit_json

from workbench.cli.__main__ import main
from workbench.ground import errors
from workbench.ground.errors import GateFailedError, InvalidRecipeError, UsageError, WorkbenchError

MIX = "bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n"
# What is typed, the exit status, what the error says first.
OUTCOMES: dict[str, tuple[str, int, str]] = {
    "version": ("--version", 0, ""),
    "help": ("run --help", 0, ""),
    "done": ("run mix", 0, ""),
    "a valid recipe": ("recipe check mix", 0, ""),
    "a plan": ("plan mix", 0, ""),
    "a sound run": ("runs verify mix", 0, ""),
    "a missing brick": ("run lost", 1, "brick 'one': no such directory: bricks/eno"),
    "an unknown run": ("runs show nope", 1, "no run 'nope'"),
    "an unconfirmed removal": ("runs rm mix", 1, ""),
    "a plan of a run that the disk cannot hold": ("plan mix --runs-dir full", 1, "full/mix-"),
    "an operating system's error": ("run mix --runs-dir taken", 1, "taken/mix-"),
    "an unknown command": ("runn mix", 2, ""),
    "an unknown option": ("run mix --nope", 2, ""),
    "a missing argument": ("run", 2, ""),
    "a value of another type": ("run mix --threads many", 2, ""),
    "a wrong option": ("run mix --device tpu", 2, "--device tpu: expected auto"),
    "an invalid recipe": ("run invalid", 2, "recipes/invalid.yaml:4:5 steps.0: unknown"),
    "an invalid recipe among valid ones": ("recipe check mix invalid", 2, "recipes/invalid.yaml:4:5 steps.0: unknown"),
    "a step that the base does not allow": ("plan deep", 2, "grow depth: `blocks: 40`"),
    "a run whose files differ": ("runs verify broken", 3, "runs/broken: "),
    "a model of a run whose files differ": ("chat runs/broken", 3, "runs/broken: "),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, llama: Path, bricks: Path) -> Project:
    """Recipes that end well and badly, a sound run and a broken one."""
    models = tmp_path_factory.mktemp("models")
    (models / "base").symlink_to(llama)
    (models / "bricks").symlink_to(bricks)
    project = Project.of(tmp_path_factory.mktemp("world"), models)
    project.write(MIX.replace("bricks/one", "bricks/eno"), "lost.yaml")
    project.write("steps:\n  - merge: teis\n", "invalid.yaml")
    project.write("steps: [{grow: depth, blocks: 40}]\n", "deep.yaml")
    run = Path(project.run(MIX, "mix.yaml")["run"])
    shutil.copytree(run, project.path / "runs" / "broken")
    edit_json(project.path / "runs" / "broken" / "model" / "config.json", rope_theta=1.5)
    (project.path / "taken").write_text("")
    return project


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Return the exit status of a command line, whose user says no."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    monkeypatch.setattr("workbench.cli.app._drop_output", lambda: None)  # the test's own output
    monkeypatch.setattr(sys, "argv", ["workbench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_exit_status(outcome: str, world: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed, status, said = OUTCOMES[outcome]
    monkeypatch.chdir(world.path)
    monkeypatch.setenv("COLUMNS", "200")
    if "--runs-dir full" in typed:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    assert ended(monkeypatch, *typed.split()) == status
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("error: ") == bool(said), printed
    assert f"error: {said}" in printed or not said, printed


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (WorkbenchError("x"), 1),
        (UsageError("x"), 2),
        (InvalidRecipeError("x"), 2),
        (GateFailedError("x"), 3),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 1),
        (OSError(28, "No space left"), 1),
        (MemoryError(), 1),
        (RuntimeError("Could not determine home directory."), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("command", ["plan mix", "runs show mix"], ids=["command", "command of a group"])
def test_an_error_inside_a_command(
    command: str, error: BaseException, status: int, world: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.chdir(world.path)
    monkeypatch.setattr("workbench.console.output.out.result", fail)
    assert ended(monkeypatch, *command.split()) == status


def test_the_documents_promise_these() -> None:
    """Each status of the table is documented, each documented one is in the table, and no error has another."""
    (promise,) = re.findall(r"^Exit status: (.+)$", (PROJECT / "docs" / "commands.md").read_text("utf-8"), re.MULTILINE)
    tried = {status for _, status, _ in OUTCOMES.values()} | {130}
    assert {int(number) for number in re.findall(r"\b\d+\b", promise)} == tried
    known, found = [WorkbenchError], set()
    while known:
        error = known.pop()
        known += error.__subclasses__()
        found.add(error.exit_code)
    assert found == {1, 2, 3}
    assert errors.WorkbenchError.exit_code == 1

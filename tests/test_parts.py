"""Parts of the workbench: a package without one, and with one more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from worlds.places import PROJECT
from worlds.processes import in_one_process
from worlds.project import Project

import workbench
from workbench.cli import index
from workbench.cli.app import app
from workbench.ground import parts as registry
from workbench.ground.parts import parts

MERGED = "bricks: {one: bricks/one}\nsteps: [{merge: average}]\n"
FUSED = "bricks: {full: bricks/full}\nsteps: [{fuse: mince, teachers: [full], data: rows.jsonl}]\n"


def without(part: str, place: Path) -> dict[str, str]:
    """Lay out the package without a part, and return the environment of its processes."""
    (place / "workbench").mkdir(parents=True)
    for path in (PROJECT / "workbench").iterdir():
        if path.name not in (part, "__pycache__"):
            (place / "workbench" / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": str(place)}


@pytest.mark.parametrize("part", parts())
def test_without_a_part_the_core_works_and_its_commands_say_what_is_missing(part: str, project: Project, tmp_path: Path) -> None:
    project.write(MERGED, "mix.yaml")
    project.write(FUSED, "fused.yaml")
    (project.path / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n', "utf-8")
    lost = {name for name, one in parts().items() if name == part or part in one.needs}
    gone = {name: owner for name, owner in index.COMMANDS.items() if owner in lost}
    core = [["--help"], ["brick", "--help"], ["plan", "mix"], ["run", "mix", "--device", "cpu"], ["methods"], ["plan", "fused"]]
    core += [["eval", "mix", "--watch"]] if "view" in lost else []
    ended = in_one_process(
        [*core, *([*name.split(), "x"] for name in gone)], project.path, environment=without(part, tmp_path / "site")
    )
    done = {" ".join(one.args): one for one, _ in ended}
    for name in ("--help", "brick --help", "plan mix", "run mix --device cpu", "methods"):
        assert done[name].returncode == 0, f"without {part}: workbench {name}\n{done[name].stderr}"
    listed = [
        line.split()[0] for name in ("--help", "brick --help") for line in done[name].stdout.splitlines() if line[:3] > "   "
    ]
    assert not {name.rpartition(" ")[2] for name in gone if name.partition(" ")[0] in (name, "brick")} & {*listed}
    assert {"plan", "run", "brick", "ls"} <= {*listed}
    for name, owner in gone.items():
        one = done[f"{name} x"]
        assert one.returncode == 1, one.stderr
        assert f"`workbench {name}` needs the part '{owner}'" in one.stderr
        assert f"there is no folder workbench/{part}" in one.stderr
    fused = done["plan fused"]
    assert fused.returncode == (2 if part == "fuse" else 0), fused.stderr
    assert ("needs the part 'fuse'" in fused.stderr) == (part == "fuse")
    if "view" in lost:
        assert (done["eval mix --watch"].returncode, "--watch needs the part 'view'" in done["eval mix --watch"].stderr) == (
            1,
            True,
        )


GREETING = {
    "__init__.py": '"""Greetings."""\n',
    "part.py": 'from workbench.ground.parts import Part\n\nPART = Part(commands={"greet": "hello.commands.greet", "brick greet": "hello.commands.greet"})\n',
    "commands.py": 'def greet(name: str) -> None:\n    """Greet someone."""\n    from workbench.console.output import out\n\n    out.line(f"hello {name}")\n',
}


@pytest.fixture
def greeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A part that the workbench does not have: one folder, and no other file."""
    for name, text in GREETING.items():
        (tmp_path / "hello").mkdir(exist_ok=True)
        (tmp_path / "hello" / name).write_text(text, "utf-8")
    monkeypatch.setattr(workbench, "__path__", [*workbench.__path__, str(tmp_path)])
    caches = (registry.parts.cache_clear, registry._folders.cache_clear, index._of_parts.cache_clear, index.command.cache_clear)
    for clear in caches:
        clear()
    yield
    for name in [name for name in sys.modules if name.startswith("workbench.hello")]:
        del sys.modules[name]
    for clear in caches:
        clear()


@pytest.mark.usefixtures("greeting")
def test_a_new_part_is_one_folder() -> None:
    run = CliRunner().invoke
    assert run(app, ["greet", "you"]).output == run(app, ["brick", "greet", "you"]).output == "hello you\n"
    last = [line.split() for line in run(app, ["--help"]).output.splitlines() if line.startswith("  greet")]
    assert last == [["greet", "Greet", "someone."]]
    assert [*index.Commands()][-1] == "greet"

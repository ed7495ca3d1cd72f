"""`workbench view` as a process: the printed address opens the project's pages, a page loads no torch, and Ctrl-C ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from worlds.commands import call, refused
from worlds.project import Project
from worlds.viewer import Visitor

from workbench.view.server import Served

PROGRAM = """
import sys
from workbench.cli.app import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "lm_eval", "optuna", "scipy"} & sys.modules.keys()))
"""


def test_it_serves_a_project_until_it_is_interrupted(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    project.write("bricks: {one: bricks/one}\nsteps: [{merge: linear}]\n", "mine.yaml")
    (project.path / "deep").mkdir()
    command = [sys.executable, "-c", PROGRAM, "view", str(project.path / "deep"), "--no-browser"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    # What runs in a shell's background ignores Ctrl-C, and so do the processes that it starts: this one would serve forever.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout
        try:
            visitor = Visitor(process.stdout.readline().strip())
            assert str(project.path) in visitor.page("/")
            assert ">mine<" in visitor.page("/recipes")
            assert "merge linear" in visitor.page("/recipes/mine.yaml/plan")
            visitor.page("/scores")
            process.send_signal(signal.SIGINT)
            printed, said = process.communicate()
        finally:
            process.kill()
    assert (process.returncode, printed) == (0, "[]\n")
    assert said.splitlines()[-1] == "the viewer has ended"
    assert list(elsewhere.iterdir()) == []


def test_a_browser_is_opened_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(Served, "wait", lambda _: None)
    before = Path.cwd()
    assert call("view", str(tmp_path)).stdout.startswith("http://127.0.0.1:")
    assert opened == []
    for option, number in (("--no-browser", 0), ("--browser", 1)):
        with monkeypatch.context() as patch:
            patch.setattr("workbench.view.commands.on_terminal", lambda: True)
            printed = call("view", str(tmp_path), option).stdout.strip()
        assert opened == [printed][:number]
    assert Path.cwd() == before
    assert "no such folder" in refused("view", str(tmp_path / "none")).message

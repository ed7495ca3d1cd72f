"""Edit and memory methods of a trusted project: their bricks and memories find the method again, and nothing else does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worlds.commands import document, refused
from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.ground.errors import WorkbenchError
from workbench.ground.trust import VARIABLE
from workbench.steps.step import OUTSIDE

METHODS = '''
from typing import Literal
from workbench.edit.grace import Grace
from workbench.edit.memit import Memit
from workbench.steps import register

@register
class Mine(Memit):
    """MEMIT under another name."""

    edit: Literal["mine"]

@register
class Recall(Grace):
    """GRACE under another name."""

    edit: Literal["recall"]
'''
EDIT = "statistics: texts.jsonl, tokens_per_input: 20, contexts: 0, lambda: 0.001, layers: [1], position: prompt_last}]"


@pytest.fixture
def taught(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with facts, text for statistics and two method files' worth of classes; it is not trusted."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    monkeypatch.delenv(VARIABLE, raising=False)
    rows = [{"id": f"f{i}", "prompt": "{subject} is", "subject": f"w{i} of w{i + 10}", "target": f"w{i + 30}"} for i in range(3)]
    write_jsonl(project.path / "facts.jsonl", rows)
    texts = [" ".join(f"w{(7 * i + j) % 60}" for j in range(60)) for i in range(60)]
    (project.path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    (project.path / "methods").mkdir()
    (project.path / "methods" / "mine.py").write_text(METHODS, "utf-8")
    before = set(OUTSIDE)
    yield project
    for module, tag in set(OUTSIDE) - before:
        del OUTSIDE[module, tag]
        sys.modules.pop(module, None)


@pytest.mark.part("upkeep")
def test_an_edit_brick_finds_its_method(taught: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.upkeep.rebase import read_edit

    text = f"steps: [{{id: facts, edit: %s, facts: facts.jsonl, {EDIT}"
    built_in = taught.run(text % "memit", "memit.yaml")
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        mine = taught.run(text % "mine", "mine.yaml")
    brick = Path(mine["run"]) / "edits" / "facts"
    same = (Path(built_in["run"]) / "edits" / "facts" / "adapter_model.safetensors").read_bytes()
    assert (brick / "adapter_model.safetensors").read_bytes() == same
    assert mine["steps"][0]["key"] != built_in["steps"][0]["key"]
    assert (mine["steps"][0]["plugin"]["source"], "plugin" in built_in["steps"][0]) == ("methods/mine.py", False)
    with pytest.raises(WorkbenchError, match=r"unknown edit method 'mine'; the project's methods/ \(mine\.py\) is not loaded"):
        read_edit(brick)
    monkeypatch.setenv(VARIABLE, "1")
    assert type(read_edit(brick).step).__name__ == "Mine"


def test_a_memory_finds_its_method(taught: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(taught.path)
    taught.write("steps: [{id: facts, edit: recall, facts: facts.jsonl, min_efficacy: 0}]", "recall.yaml")
    run = document("run", "recall", "--trust-project-code", "--device", "cpu")["run"]
    listed = document("memory", "ls", run, "--trust-project-code")
    assert [fact["target"] for fact in listed["facts"]] == ["w30", "w31", "w32"]
    assert "unknown edit method 'recall'; the project's methods/ (mine.py) is not loaded" in refused("memory", "ls", run).message

"""Tables that commands print on the terminal, without --json."""

from __future__ import annotations

import pytest

from worlds.commands import call
from worlds.jsonl import write_jsonl
from worlds.project import Project


@pytest.fixture
def inside(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.path)
    return project


def lines(*arguments: str) -> list[list[str]]:
    """The words of each printed line."""
    return [line.split() for line in call(*arguments).stdout.splitlines()]


def test_facts_of_a_memory_and_their_changes(inside: Project) -> None:
    write_jsonl(inside.path / "facts.jsonl", [{"id": "f0", "prompt": "{subject} is", "subject": "w3", "target": "w4"}])
    inside.write("steps: [{edit: grace, facts: facts.jsonl, min_efficacy: 0}]\n", "memory.yaml")
    call("run", "memory", "--device", "cpu", "-o", "known")
    assert lines("memory", "ls", "known")[1] == ["f0", "w3", "is", "w4", "1", "recipe", "0.50"]
    call("memory", "feedback", "known", "f0", "--reward", "1")
    added, rewarded = lines("memory", "log", "known")[1:3]
    assert added == ["1", "add", "f0", "w4"]
    assert (rewarded[0], rewarded[2:]) == ("2", ["feedback", "f0", "1.0"])
    assert lines("memory", "ls", "known")[1][-1] == "0.85"


def test_one_metric_between_a_brick_and_others(inside: Project) -> None:
    """Rows are layers, columns the other bricks; of two bricks, columns are kinds of module."""
    pair = lines("brick", "show", "bricks/one", "bricks/two", "--base", "base", "--metric", "cosine")
    table = lines("brick", "show", "bricks/one", "bricks/two", "bricks/three", "--base", "base", "--metric", "cosine")
    start = [row[:1] for row in table].index(["layer"])
    assert table[start] == ["layer", "two", "three"]
    by_kind = pair[[row[:1] for row in pair].index(["layer"]) :]
    assert [(row[0], row[1]) for row in table[start + 1 : start + 5]] == [(row[0], row[-1]) for row in by_kind[1:5]]


def test_plans_say_what_a_step_costs(inside: Project) -> None:
    write_jsonl(inside.path / "facts.jsonl", [{"id": "f0", "prompt": "{subject} is", "subject": "w3", "target": "w4"}])
    inside.write("steps: [{id: e, edit: ultraedit, facts: facts.jsonl, layers: [1]}]\n", "edited.yaml")
    inside.write("bricks: {one: {checkpoint: bricks/full}}\nsteps: [{merge: wudi}]\n", "least.yaml")
    assert "e: values of 1 facts: about" in call("plan", "edited").stdout
    assert "peak memory about" in call("plan", "least").stdout

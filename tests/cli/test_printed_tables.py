"""Tables that commands print on the terminal, without --json."""

from __future__ import annotations

import os
import shutil

import pytest

from worlds.commands import call, document
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
    (row,) = document("memory", "ls", "known")["facts"]
    assert (row["feedback"], row["credibility"], row["used"]) == (1, 0.854, True)  # 1/2 + 1/2/sqrt(2)


SCORES = """
scores:
  - {task: sums, metric: acc, n: 40, value: 0.756, low: 0.6, high: 0.8, base_value: 0.25}
  - {task: half, metric: acc, n: 8, value: 0, low: 0, high: 1}
  - {task: text, metric: bits_per_byte, n: 9, value: 0.756, low: -.inf, high: .inf, base_value: 0.8125}
  - {task: count, metric: words, n: 7, value: 12.5, low: 11, high: 14, base_value: 0.5}
  - {task: drop, metric: words, n: 7, value: 0.5, low: 0, high: 14, base_value: 12.5}
"""


def test_scores_of_a_card_are_shares_in_percent_or_in_the_metrics_units(inside: Project) -> None:
    own = inside.path / "mine" / "bricks" / "one"
    shutil.copytree(inside.path / "bricks" / "one", own)
    (own / "brick.yaml").write_text(f"version: 1\nname: one\nkind: adapter\nbase: {{id: base}}\n{SCORES}")
    assert [line[9:] for line in call("brick", "show", str(own), "--card").stdout.splitlines() if line.startswith("score ")] == [
        "sums acc 75.6 [60.0, 80.0], n = 40, base 25.0",
        "half acc 0.0 [0.0, 100.0], n = 8",
        "text bits_per_byte 0.756 [-inf, inf], n = 9, base 0.8125",
        "count words 12.5 [11, 14], n = 7, base 0.5",
        "drop words 0.5 [0, 14], n = 7, base 12.5",
    ]
    os.chdir(inside.path / "mine")
    assert lines("brick", "ls")[1] == ["one", "adapter", "76", "25", "sums"]


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

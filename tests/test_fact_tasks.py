"""Facts as lm-eval tasks: what each task asks, its numbers against independent computations, and plain lm_eval."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from project import CPU, Project
from test_end_to_end import call, document

from workbench.controls import lineup, plans, suites_of
from workbench.errors import WorkbenchError
from workbench.evaluate import score
from workbench.factsuite import factscores
from workbench.recipe import load_recipe
from workbench.scores import Configuration
from workbench.suites import Plan

FACTS = [
    {"id": "one", "prompt": "w1 w2 {subject} is", "subject": "w3", "target": "w4 w5", "target_true": "w6", "paraphrases": ["w7 {subject} of", "w8 w9 of"],
     "neighbours": ["w10 w2 is", {"prompt": "w11 w2 is", "target": "w12"}], "portability": [{"prompt": "w13 of", "target": "w14"}]},
    {"id": "two", "prompt": "w20 {subject} is", "subject": "w21", "target": "w22", "target_true": "w23 w24 w25", "paraphrases": ["w26 w27 is"],
     "neighbours": [{"prompt": "w28 w29", "target": "w30"}]},
    {"id": "three", "prompt": "w31 w32 of", "target": "w33"},
]  # fmt: skip
EDIT = "steps: [{edit: finetune, facts: facts.jsonl, epochs: 3, layers: [1], stop: 0}]\noutput: {dtype: float32}\n"


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with three facts and a recipe that edits them."""
    (project.path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in FACTS))
    project.write(EDIT + "eval: [edits]\n", "edit.yaml")
    monkeypatch.chdir(project.path)
    return project


def plan_of(project: Project, name: str = "edit.yaml", named: tuple[str, ...] = ()) -> Plan:
    recipe = load_recipe(project.path / "recipes" / name)
    (plan,) = plans(lineup([recipe]), suites_of([recipe], named, project.path), batch_size=4, limit=None, device=CPU)
    return plan


def docs(plan: Plan, kind: str) -> list[dict[str, Any]]:
    assert plan.suite.facts
    file = plan.tasks_dir / "data" / f"{plan.suite.facts.tasks[kind]}.jsonl"  # type: ignore[index]
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_look(world: Project) -> None:
    plan = plan_of(world)
    for f in sorted(plan.tasks_dir.rglob("*.*")):
        print(f, f.read_text()[:1500])
    print(call("eval", "edit").output)
    print(document("eval", "edit"))

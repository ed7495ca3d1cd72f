"""Scoring and chat with memories: every scorer sees the memory act, and what is out of scope keeps its very numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.jsonl import write_jsonl
from worlds.local_tasks import CHOICE, GENERATE, LOCALDATA
from worlds.memory_world import FACTS, GRACE, MEMORY, OUTSIDE, text_of
from worlds.project import Project

import workbench
from workbench.cli.app import main
from workbench.evaluate import build_plan, score
from workbench.scores.store import Configuration
from workbench.scores.suite import Suite


@pytest.fixture
def asked(project: Project) -> Project:
    """A project whose suite asks for the facts and for other prompts."""
    write_jsonl(project.path / "facts.jsonl", FACTS)
    tasks = project.path / "evals" / "tasks"
    (tasks / "data").mkdir(parents=True)
    (tasks / "localdata.py").write_text(LOCALDATA)
    (tasks / "copy.yaml").write_text(GENERATE)
    (tasks / "pick.yaml").write_text(CHOICE)
    prompts = [(f"in-{i}", text_of(row), row["target"]) for i, row in enumerate(FACTS)]
    prompts += [(f"out-{i}", text, "w33 w43") for i, text in enumerate(OUTSIDE)]
    write_jsonl(
        tasks / "data" / "copy.jsonl",
        [{"id": name, "cluster": name, "prompt": prompt, "answer": target, "choices": [target, "w3 w4", "w5"], "gold": 0}
         for name, prompt, target in prompts])  # fmt: skip
    (project.path / "evals" / "suites").mkdir()
    (project.path / "evals" / "suites" / "toy.yaml").write_text("suite: toy\ntasks: [copy, pick]\n")
    return project


def rows(project: Project, text: str, scorer: str) -> dict[str, dict[str, Any]]:
    """Task -> item -> what was answered."""
    resolved = project.resolve(text)
    suite = Suite.model_validate({"suite": "toy", "tasks": ["copy", "pick"], "scorer": scorer})
    plan = build_plan(suite, resolved.tokenizer_path, tasks_dir=project.path / "evals" / "tasks", batch_size=4)
    scores, found = score(
        plan, Configuration("a" * 32, "a"), workbench.load_recipe(project.path / "recipes" / "test.yaml").model("cpu")
    )
    assert scores.tasks["pick"].scorer == scorer
    return {task: {row["id"]: row for row in answers} for task, answers in found.items()}


@pytest.mark.parametrize("scorer", ["hflm", "packed", "prefix"])
@pytest.mark.parametrize("text", [GRACE, MEMORY])
def test_scores(text: str, scorer: str, asked: Project) -> None:
    base, mine = rows(asked, "steps: []\n", scorer), rows(asked, text, scorer)
    for name, row in base["pick"].items():
        outside = name.startswith("out")
        assert (mine["pick"][name]["loglikelihoods"] == row["loglikelihoods"]) == outside, name
        assert not outside or mine["copy"][name]["response"] == base["copy"][name]["response"]
    assert any(mine["copy"][name]["response"] != row["response"] for name, row in base["copy"].items())
    if text == GRACE:
        assert [mine["copy"][f"in-{i}"]["response"] for i in range(6)] == [row["target"] for row in FACTS]
        assert all(mine["pick"][f"in-{i}"]["metrics"]["acc"] == 1 for i in range(6))


def test_recalled_pairs_are_the_base_with_the_fact_in_front(asked: Project) -> None:
    """Log-likelihoods in scope are the base's on the fact and the prompt; the answer plays no part in what is recalled."""
    found = rows(asked, MEMORY, "hflm")["pick"]["in-2"]["loglikelihoods"]
    plain = workbench.load(asked.path / "base", device="cpu")
    tokenizer = workbench.load_tokenizer(asked.path / "base")
    context = tokenizer(f"New fact: {text_of(FACTS[2])} {FACTS[2]['target']}.\nPrompt: {text_of(FACTS[2])}")["input_ids"]
    for value, choice in zip(found, (FACTS[2]["target"], "w3 w4", "w5"), strict=True):
        target = tokenizer(choice)["input_ids"]
        with torch.no_grad():
            chances = plain(torch.tensor([context + target])).logits[0].float().log_softmax(-1)
        wanted = sum(float(chances[len(context) + i - 1, token]) for i, token in enumerate(target))
        assert value == pytest.approx(wanted, abs=0.1)


def test_eval_and_chat_from_the_command_line(
    asked: Project, monkeypatch: pytest.MonkeyPatch, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eval scores a recipe with a memory, and a configuration directory whose facts have changed; chat answers with the facts."""
    asked.write(GRACE, "facts.yaml")
    run(monkeypatch, "run", "recipes/facts.yaml", "--device", "cpu", "-o", "mine")
    run(monkeypatch, "memory", "update", "mine", "f0", "--target", "w59", "--device", "cpu")
    capsys.readouterr()
    run(monkeypatch, "eval", "recipes/facts.yaml", "mine", "--suite", "toy", "--device", "cpu", "--json")
    document = json.loads(capsys.readouterr().out)
    exact = {c["name"]: c["tasks"]["copy"]["exact_match"]["value"] for c in document["configurations"]}
    assert exact.keys() == {"base", "facts", "mine"}
    assert exact["facts"] == pytest.approx(6 / 11)
    assert exact["mine"] == pytest.approx(5 / 11)
    for target in ("recipes/facts.yaml", "mine", str(next(Path("runs").glob("facts-*")))):
        monkeypatch.setattr("sys.stdin", io.StringIO(text_of(FACTS[1]) + "\n"))
        run(monkeypatch, "chat", target, "--plain", "--device", "cpu", "--max-new-tokens", "4")
        assert FACTS[1]["target"] in capsys.readouterr().out
    run(monkeypatch, "runs", "verify", next(Path("runs").glob("facts-*")).name)
    run(monkeypatch, "runs", "show", next(Path("runs").glob("facts-*")).name)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["workbench", *arguments])
    try:
        main()
    except SystemExit as end:
        assert not end.code, arguments  # noqa: PT017

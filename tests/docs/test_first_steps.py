"""The commands of docs/first-steps.md and docs/own-tasks.md, on tiny models; each command names the next one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from worlds.commands import call
from worlds.places import PROJECT

PAGE = (PROJECT / "docs" / "first-steps.md").read_text("utf-8")
TASKS = (PROJECT / "docs" / "own-tasks.md").read_text("utf-8")


def block(page: str, kind: str, start: str) -> str:
    """Return the page's code block of a kind that starts with a text."""
    return str(next(b for b in re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) if b.startswith(start)))


def spoken(models: dict[str, Path], text: str) -> str:
    """Replace the page's models by tiny ones."""
    return re.sub("|".join(models), lambda m: str(models[m.group()]), text)


@pytest.fixture
def models(llama: Path, bricks: Path) -> dict[str, Path]:
    return {"org/base": llama, "org/chat": bricks / "full", "/path/to/lora": bricks / "one"}


def questions(path: Path, number: int) -> None:
    """Write questions of the page's form."""
    question = block(PAGE, "json", "{")
    path.write_text("".join(question.replace("largest", f"{n}-th") for n in range(number)), "utf-8")


def test_two_models_and_questions_lead_to_a_report(models: dict[str, Path], cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [shlex.split(spoken(models, line)) for line in block(PAGE, "sh", "pip install").splitlines()]
    assert len(commands) < 10
    install, new, enter, *rest = commands
    assert install == ["pip", "install", ".[all]"]
    assert enter == ["cd", "project"]
    questions(cwd / "questions.jsonl", 100)
    assert "workbench recipe new mine --project" in " ".join(call("--help").output.split())
    said = call(*new[1:]).stderr
    monkeypatch.chdir(cwd / "project")
    assert block(PAGE, "yaml", "version: 1\nbase: org/base") == re.sub(
        "|".join(map(str, models.values())),
        lambda m: next(name for name, path in models.items() if str(path) == m.group()),
        re.sub(r" +#.*", "", Path("recipes/mine.yaml").read_text("utf-8").partition("\n")[2]),
    )
    for words in rest:
        hint = " ".join(words[1:3]) if words[1] == "suite" else " ".join(words[1:])
        assert f"workbench {hint}" in said.replace("eval RECIPE", "eval mine"), f"no command before it prints: {' '.join(words)}"
        said += call(*words[1:]).stderr
    (made,) = Path("runs").glob("mine-*/model")
    assert (made / "model.safetensors").is_file()
    assert "runs/mine-KEY/model" in PAGE
    assert "runs/mine-KEY/model" in (PROJECT / "README.md").read_text("utf-8")
    assert "<html" in Path("reports/report.html").read_text("utf-8")[:200]
    table = json.loads(Path("reports/report.json").read_text("utf-8"))
    assert [c["name"] for c in table["configurations"]] == ["base", "chat", "code", "average", "mine"]
    assert table["tasks"][0]["n"] == 100


def test_a_task_file_by_hand_is_scored(models: dict[str, Path], cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = next(line for line in block(PAGE, "sh", "pip install").splitlines() if line.startswith("workbench recipe new"))
    call(*shlex.split(spoken(models, new))[1:])
    monkeypatch.chdir(cwd / "project")
    questions(Path("evals/tasks/questions.jsonl"), 10)
    Path("evals/tasks/questions.yaml").write_text(block(TASKS, "yaml", "task:"), "utf-8")
    recipe = Path("recipes/mine.yaml")
    recipe.write_text(recipe.read_text("utf-8") + block(TASKS, "yaml", "eval:"), "utf-8")
    for line in block(TASKS, "sh", "workbench eval mine\n").splitlines():
        call(*line.split()[1:], code=(0, 3))
    call("report", "mine")
    (task,) = json.loads(Path("reports/report.json").read_text("utf-8"))["tasks"]
    assert task["task"] == "questions"
    assert task["n"] == 10


def test_a_new_project_finds_models_of_the_working_directory(llama: Path, cwd: Path) -> None:
    (cwd / "base").symlink_to(llama)
    call("recipe", "new", "mine", "--project", "project", "--base", "base", "--brick", "other=base", "--brick", "far=org/far")
    text = Path("project/recipes/mine.yaml").read_text("utf-8")
    assert f"base: {(cwd / 'base').resolve()}\n" in text
    assert f"other: {(cwd / 'base').resolve()}\n" in text
    assert "far: org/far\n" in text

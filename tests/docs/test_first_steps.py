"""The commands of docs/first-steps.md, on tiny models, with the page's own task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from worlds.commands import call

PAGE = Path(__file__).parents[2] / "docs" / "first-steps.md"


def block(kind: str, start: str) -> str:
    """Return the page's code block of a kind that starts with a text."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return str(next(b for b in blocks if b.startswith(start)))


def test_two_models_and_questions_lead_to_a_report(llama: Path, bricks: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = next(line for line in block("sh", "pip").splitlines() if line.startswith("workbench recipe new"))
    models = {"org/base": llama, "org/chat": bricks / "full", "/path/to/lora": bricks / "one"}
    words = [re.sub("|".join(models), lambda m: str(models[m.group()]), word) for word in new.split()[1:]]
    call(*words)
    monkeypatch.chdir(cwd / "project")
    question = block("json", "{")
    Path("evals/tasks/questions.jsonl").write_text("".join(question.replace("largest", f"{n}-th") for n in range(10)), "utf-8")
    Path("evals/tasks/questions.yaml").write_text(block("yaml", "task:"), "utf-8")
    recipe = Path("recipes/mine.yaml")
    assert block("yaml", "version: 1\nbase: org/base") == re.sub(
        "|".join(map(str, models.values())),
        lambda m: next(name for name, path in models.items() if str(path) == m.group()),
        re.sub(r" +#.*", "", recipe.read_text("utf-8").partition("\n")[2]),
    )
    recipe.write_text(recipe.read_text("utf-8") + block("yaml", "eval:"), "utf-8")
    steps = [
        line.partition("#")[0].split()[1:]
        for part in re.findall(r"```sh\n(workbench.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
        for line in part.splitlines()
    ]
    assert [words[0] for words in steps] == ["recipe", "plan", "run", "eval", "eval", "compare", "report"]
    for words in steps:
        if "--require-safe" not in words:
            call(*words)
    (made,) = Path("runs").glob("mine-*/model")
    assert "runs/mine-KEY/model" in PAGE.read_text("utf-8")
    assert "runs/mine-KEY/model" in (PAGE.parents[1] / "README.md").read_text("utf-8")
    assert (made / "model.safetensors").is_file()
    table = json.loads(Path("reports/report.json").read_text("utf-8"))
    assert [c["name"] for c in table["configurations"]] == ["base", "chat", "code", "average", "mine"]
    assert table["tasks"][0]["n"] == 10

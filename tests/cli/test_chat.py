"""`chat` with two models: one live model where weights allow it, own templates and histories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from worlds.project import CPU, Project

from workbench.api.chatting import Speaker
from workbench.cli.app import app
from workbench.run.materialize import materialize, shared

AVERAGE = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\n"
TIES = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: ties, density: 0.5, lambda: 3.0}]\n"
DEEPER = "steps: [{grow: depth, blocks: 1}]\n"


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    for name, text in (("average", AVERAGE), ("ties", TIES), ("deeper", DEEPER)):
        project.write(text, f"{name}.yaml")
    monkeypatch.chdir(project.path)
    return project


def chat(*arguments: str, lines: str = "w1 w2\n", code: int = 0) -> Result:
    result = CliRunner().invoke(
        app, ["chat", *arguments, "--plain", "--max-new-tokens", "4", "--device", "cpu"], input=lines, catch_exceptions=code != 0
    )
    assert result.exit_code == code or code, result.output
    return result


def same(model: Any, expected: Any) -> bool:
    mine, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_one_model_holds_either_configuration(world: Project) -> None:
    """Its weights are those of `materialize` bit by bit, in any order, and only what differs is held twice."""
    texts = {"average.yaml": AVERAGE, "ties.yaml": TIES, "base.yaml": "steps: []\n"}
    every = [world.resolve(text, name) for name, text in texts.items()]
    one = shared(every, CPU)
    assert one is not None
    expected = [materialize(resolved, CPU) for resolved in every]
    assert not any(same(expected[i], expected[i - 1]) for i in range(3))
    for number in (0, 1, 1, 2, 0, 2, 1, 0):
        assert same(one.holding(number), expected[number])
        assert one.model.generation_config.to_dict() == expected[number].generation_config.to_dict()
    whole = sum(p.nbytes for p in expected[0].parameters())
    differing = [
        p.nbytes
        for other in expected[1:]
        for p, q in zip(expected[0].parameters(), other.parameters(), strict=True)
        if not torch.equal(p, q)
    ]
    assert one.bytes == sum(differing)
    assert 0 < one.bytes < 2 * whole


def test_other_parameters_are_not_shared(world: Project) -> None:
    average, deeper = world.resolve(AVERAGE, "average.yaml"), world.resolve(DEEPER, "deeper.yaml")
    assert shared([average, deeper], CPU) is None
    narrow = world.resolve(AVERAGE + "output: {dtype: float16}\n", "narrow.yaml")
    assert shared([average, average, narrow], CPU) is None


def test_two_answer_as_each_alone(world: Project) -> None:
    alone = {name: chat(f"recipes/{name}.yaml", lines="w1 w2\nw5\n").stdout for name in ("average", "ties", "deeper")}
    for first, second, said in (("average", "ties", "both share one model"), ("average", "deeper", "two models are in memory")):
        found = chat(f"recipes/{first}.yaml", f"recipes/{second}.yaml", lines="w1 w2\nw5\n")
        assert said in found.stderr
        turns = zip(*(alone[name].splitlines() for name in (first, second)), strict=True)
        expected = [line for one, two in turns for line in (f"[recipes/{first}.yaml]", one, f"[recipes/{second}.yaml]", two)]
        assert found.stdout.splitlines() == expected


def test_a_model_directory_shares_with_a_recipe_on_it(world: Project) -> None:
    assert "both share one model" in chat("base", "recipes/ties.yaml").stderr


def test_bad_input_is_refused_before_anything_is_loaded(world: Project) -> None:
    assert "named twice" in str(chat("base", "base", code=2).exception)
    assert "one or two models" in str(chat("base", "recipes/ties.yaml", "recipes/average.yaml", code=2).exception)
    assert "recipes/tis.yaml" in str(chat("base", "recipes/tis.yaml", code=1).exception)


class Tokens(dict[str, Any]):
    def to(self, _device: Any) -> Tokens:
        return self


class Tokenizer:
    """Notes what it is asked, in words of its own template if it has one."""

    pad_token_id = eos_token_id = 0

    def __init__(self, template: str | None) -> None:
        self.chat_template, self.asked = template, list[str]()

    def apply_chat_template(self, history: list[dict[str, str]], **_: Any) -> Tokens:
        self.asked.append(f"{self.chat_template}: " + " / ".join(turn["content"] for turn in history))
        return Tokens(input_ids=torch.zeros(1, 2, dtype=torch.long))

    def __call__(self, line: str, **_: Any) -> Tokens:
        self.asked.append(line)
        return Tokens(input_ids=torch.zeros(1, 2, dtype=torch.long))

    def decode(self, _tokens: Any, **_: Any) -> str:
        return "answer"


class Model:
    device = CPU

    def generate(self, **_: Any) -> torch.Tensor:
        return torch.zeros(1, 3, dtype=torch.long)


def test_each_has_its_own_template_and_history() -> None:
    tokenizers = [Tokenizer("A"), Tokenizer(None)]
    speakers = [Speaker(str(t.chat_template), Model, t, t.chat_template is not None) for t in tokenizers]
    for line in ("one", "two"):
        for speaker in speakers:
            speaker.answer(line, 3, lambda _: None)
    assert tokenizers[0].asked == ["A: one", "A: one / answer / two"]
    assert tokenizers[1].asked == ["one", "two"]

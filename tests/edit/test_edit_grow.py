"""Edits are bricks that can be taken out again; growth computes what the model computed before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import live, save_model, tensors_of

from workbench.facts.published import read_facts
from workbench.ground.errors import WorkbenchError
from workbench.recipe.methods import methods
from workbench.run.compose import compose

EDIT = "{edit: finetune, facts: facts.jsonl, form: lora, layers: [0, 1], learning_rate: 0.05, epochs: 60, batch_size: 8}"
FAMILIES = ["llama", "llama_untied", "qwen2", "gpt2", "gemma2", "gpt_neox", "gpt_neo", "opt"]


@pytest.fixture
def facts(project: Project) -> list[tuple[str, str]]:
    pairs = [(f"w{i} of w{i + 1} is", f"w{i + 20} w{i + 30}") for i in range(4)]
    rows = [{"prompt": prompt, "target": target} for prompt, target in pairs]
    write_jsonl(project.path / "facts.jsonl", rows)
    return pairs


@torch.no_grad()
def probability(model: Any, base: Path, pairs: list[tuple[str, str]]) -> float:
    """Mean probability of a target token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for prompt, target in pairs:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(f"{prompt} {target}")["input_ids"]])
        chances = model(ids).logits[0].softmax(-1)
        found += [float(chances[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])]
    return sum(found) / len(found)


def test_finetune_is_a_brick(project: Project, facts: list[tuple[str, str]]) -> None:
    """The facts are learned; PEFT loads the result, on the base, with the logits of the written checkpoint."""
    from peft import PeftModel

    document = project.run(f"steps: [{EDIT}]\noutput: {{dtype: float32}}\n")
    base, written = live(project.path / "base"), live(Path(document["model"]))
    assert probability(base, project.path / "base", facts) < 0.1
    assert probability(written, project.path / "base", facts) > 0.7
    record = document["steps"][0]
    assert (record["facts"], record["tensors"]) == (4, 2)
    assert record["solved_on"] != ""

    adapter = Path(document["run"]) / "edits" / "edit-finetune"
    tokens = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(base, adapter)(tokens).logits
        torch.testing.assert_close(wrapped, written(tokens).logits, atol=1e-5, rtol=0)


def test_edit_is_solved_once_and_on_the_current_model(
    project: Project, facts: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    del facts
    text = f"bricks: {{full: bricks/full}}\nsteps: [{{merge: average}}, {EDIT}]\n"
    first = project.resolve(text)
    edits = compose(first, CPU).edits
    alone = project.resolve(f"steps: [{EDIT}]\n")
    assert first.keys[1] != alone.keys[0]
    monkeypatch.setattr(methods()["edit:finetune"], "solve", lambda *_: pytest.fail("solved again"))
    assert compose(first, CPU).edits == edits
    (project.path / "facts.jsonl").write_text('{"prompt": "w1 is", "target": "w2"}\n', "utf-8")
    assert project.resolve(text).keys[1] != first.keys[1]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt2 without its root"])
def test_edit_of_other_layouts(
    family: str, project: Project, facts: list[tuple[str, str]], model_of: Callable[..., Path]
) -> None:
    """Transposed weights, biases, and a base saved without the live model's root prefix, as on the hub."""
    from peft import PeftModel

    name, _, rootless = family.partition(" ")
    base = model_of(name)
    if rootless:
        base = save_model(project.path / "rootless", name)
        save_file(
            {n.removeprefix("transformer."): t for n, t in tensors_of(base).items()},
            base / "model.safetensors",
            metadata={"format": "pt"},
        )
    document = project.run(f"base: {base}\nsteps: [{EDIT}]\noutput: {{dtype: float32}}\n")
    written = live(Path(document["model"]))
    assert probability(written, base, facts) > 0.5
    tokens = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(live(base), Path(document["run"]) / "edits" / "edit-finetune")(tokens).logits
        torch.testing.assert_close(wrapped, written(tokens).logits, atol=2e-5, rtol=0)


def test_fact_without_tokens(project: Project, llama: Path) -> None:
    base = project.path / "deaf"
    base.mkdir()
    for file in llama.iterdir():
        (base / file.name).symlink_to(file)
    (base / "tokenizer.json").unlink()
    tokenizer = json.loads((llama / "tokenizer.json").read_text("utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Removed", "invert": False}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (project.path / "facts.jsonl").write_text('{"prompt": "w1 is", "target": "w2"}\n', "utf-8")
    with pytest.raises(WorkbenchError, match="'w1 is' has no tokens in the base's vocabulary"):
        compose(project.resolve(f"base: deaf\nsteps: [{EDIT}]\n"), CPU)


GOOD = '{"prompt": "a is", "target": "b"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.jsonl: no facts"),
        ("\n\n", "f.jsonl: no facts"),
        (GOOD + "{nope\n", "f.jsonl:2: not JSON"),
        (GOOD + "\n" + '{"prompt": "a"}\n', "f.jsonl:3: expected a text in 'target', found prompt"),
        ('{"prompt": "", "target": "b"}\n', "f.jsonl:1: expected a text in 'prompt', found prompt, target"),
        ('{"prompt": 3, "target": "b"}\n', "f.jsonl:1: expected a text in 'prompt'"),
        ('["a", "b"]\n', "f.jsonl:1: expected a JSON object, one in each row, found list"),
        ("3\n", "f.jsonl:1: expected a JSON object, one in each row, found int"),
        (
            GOOD + '{"prompt": "a is", "target": "c"}\n',
            "f.jsonl:2: same prompt as f.jsonl:1, but another target ('c' instead of 'b')",
        ),
    ],
)
def test_bad_facts(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(text, "utf-8")
    with pytest.raises(WorkbenchError) as caught:
        read_facts(tmp_path / "f.jsonl", "f.jsonl")
    assert caught.value.message.startswith(message)


def test_good_facts(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(GOOD + "\n" + GOOD + '{"prompt": "x:\\n", "target": "y"}\n', "utf-8")
    assert [(f.prompt, f.continuation) for f in read_facts(tmp_path / "f.jsonl", "f")] == [("a is", " b"), ("x:\n", "y")]
    with pytest.raises(WorkbenchError, match=r"g\.jsonl: no such facts file") as caught:
        read_facts(tmp_path / "g.jsonl", "g.jsonl")
    assert caught.value.hint == f"Did you mean '{tmp_path / 'f.jsonl'}'?"


# -- edits of grown models


def test_grow_twice_and_edit(project: Project, facts: list[tuple[str, str]]) -> None:
    """A second growth counts the first one's layers; an edit after it is solved on the grown model."""
    text = f"steps: [{{grow: depth, after: [0]}}, {{grow: depth, after: [1, 4]}}, {EDIT}]\noutput: {{dtype: float32}}\n"
    document = project.run(text)
    assert [s.get("new_layers") for s in document["steps"]] == [[1], [2, 6], None]
    assert probability(live(Path(document["model"])), project.path / "base", facts) > 0.5

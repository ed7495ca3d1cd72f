"""New tokens: what the model computes of old ones, what rows the new ones have, and what the tokenizer makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.project import Project
from worlds.tiny import VOCABULARY, WORDS, edit_json, save_model, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json
from workbench.run.plan import plan

# Families whose embeddings or heads differ; `test_growth_table.py` grows the others.
FAMILIES = ["llama", "qwen2", "gemma2", "gpt_neox", "gpt2", "phi", "opt", "granite", "cohere"]
HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_old_tokens_keep_their_logits(family: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    """Checked by `run` with cached generation, and once more on what it wrote; the tokenizer knows the tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    step = '{grow: vocabulary, tokens: ["<tool>", "<call>", w1w2], pad_to_multiple_of: 8}'
    document = project.run(f"base: {dense_of(family)}\nsteps: [{step}]\n")
    check = document["steps"][0]["check"]
    assert check["max_logit_difference"] <= 1e-6
    assert check["same_generation"]
    assert 0 < check["new_token_probability"] < 0.2
    after, info = AutoModelForCausalLM.from_pretrained(document["model"], output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    rows = -(-(VOCABULARY + 3) // 8) * 8
    assert after.config.get_text_config().vocab_size == rows == after.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    before = AutoModelForCausalLM.from_pretrained(dense_of(family), dtype=torch.float32)
    with torch.no_grad():
        assert float((before.eval()(tokens).logits - after.eval()(tokens).logits[..., :VOCABULARY]).abs().max()) <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(document["model"])
    assert tokenizer("w3 <tool> w4").input_ids.count(VOCABULARY) == 1


def test_rows_are_means(project: Project) -> None:
    """Of all tokens, of a description's tokens, of the token's own pieces; in embeddings and head alike."""
    save_model(project.path / "untied", "llama_untied", dtype=torch.float32)
    base = tensors_of(project.path / "untied")
    step = '{grow: vocabulary, tokens: {"<a>": null, "<b>": "w1 w2 w2 is"}}'
    made = project.run(f"base: untied\nsteps: [{step}]\noutput: {{dtype: float32}}\n")
    grown = tensors_of(Path(made["model"]))
    for name in HEAD:
        assert torch.equal(grown[name][:VOCABULARY], base[name])
        assert torch.allclose(grown[name][VOCABULARY], base[name].double().mean(0).float(), atol=1e-7)
        described = base[name][[WORDS.index(w) for w in ("w1", "w2", "w2", "is")]]
        assert torch.allclose(grown[name][VOCABULARY + 1], described.double().mean(0).float(), atol=1e-7)
    assert {n for n in grown if not torch.equal(grown[n], base[n].new_zeros(0) if n not in base else base[n])} == set(HEAD)
    (project.path / "tokens.jsonl").write_text('{"token": "<a>"}\n\n{"token": "<b>", "description": "w1 w2 w2 is"}\n', "utf-8")
    (project.path / "tokens.txt").write_text("w1 w2\nw5 of\n", "utf-8")
    again = project.tensors("base: untied\nsteps: [{grow: vocabulary, file: tokens.jsonl}]\n")
    assert all(torch.equal(again[n], grown[n]) for n in grown)
    pieces = project.tensors("base: untied\nsteps: [{grow: vocabulary, file: tokens.txt, rows: pieces}]\n")
    own = base[HEAD[0]][[WORDS.index("w5"), WORDS.index("of")]].mean(0)
    assert torch.allclose(pieces[HEAD[0]][VOCABULARY + 1], own, atol=1e-7)


def test_padding_rows_are_used_first(project: Project) -> None:
    """A model with more rows than tokens keeps its shape; what the padding rows held is not compared, all else is."""
    save_model(project.path / "padded", "llama", dtype=torch.float32)
    from safetensors.torch import load_file, save_file

    file = project.path / "padded" / "model.safetensors"
    tensors = load_file(file)
    padding = torch.randn(4, tensors[HEAD[0]].shape[1], generator=torch.Generator().manual_seed(0))
    tensors[HEAD[0]] = torch.cat((tensors[HEAD[0]], padding))
    save_file(tensors, file, {"format": "pt"})
    edit_json(project.path / "padded" / "config.json", vocab_size=VOCABULARY + 4)
    document = project.run('base: padded\nsteps: [{grow: vocabulary, tokens: ["<a>", "<b>"]}]\n')
    grown = tensors_of(Path(document["model"]))[HEAD[0]]
    assert document["steps"][0]["rows"] == [VOCABULARY + 4, VOCABULARY + 4]
    assert torch.equal(grown[:VOCABULARY], tensors[HEAD[0]][:VOCABULARY])
    assert torch.equal(grown[VOCABULARY + 2 :], padding[2:])
    assert torch.allclose(grown[VOCABULARY], tensors[HEAD[0]][:VOCABULARY].mean(0), atol=1e-6)
    assert document["steps"][0]["check"]["same_generation"]


def test_steps_meet_the_tokenizer_of_their_place(project: Project) -> None:
    """A second growth continues the ids; bricks merge before it and below the vocabulary after it; special tokens are hidden in text."""
    from transformers import AutoTokenizer

    two = """\
        bricks: {one: bricks/one}
        steps:
          - {grow: vocabulary, tokens: ["<a>"], special: true}
          - {grow: depth, blocks: 1}
          - {merge: task_arithmetic, bricks: {one: 1.0}}
          - {grow: vocabulary, id: later, tokens: {"<b>": "w1 <a>"}}
    """
    document = project.run(two)
    tokenizer = AutoTokenizer.from_pretrained(document["model"])
    assert tokenizer("<a> w1 <b>").input_ids == [VOCABULARY, WORDS.index("w1"), VOCABULARY + 1]
    assert tokenizer.decode([VOCABULARY, WORDS.index("w1")], skip_special_tokens=True).strip() == "w1"
    embeddings = tensors_of(Path(document["model"]))[HEAD[0]].float()
    mean = embeddings[[VOCABULARY, WORDS.index("w1")]].mean(0)
    assert torch.allclose(embeddings[VOCABULARY + 1], mean, atol=1e-2)
    assert read_json(Path(document["model"]) / "config.json")["vocab_size"] == VOCABULARY + 2  # type: ignore[index]
    with pytest.raises(WorkbenchError, match=r"bricks change 1 tensor whose shape step .* has changed") as caught:
        project.run(
            'bricks: {full: bricks/full}\nsteps: [{grow: vocabulary, tokens: ["<a>"]}, {merge: task_arithmetic}]\n',
            "dense.yaml",
        )
    assert "Merge the bricks before that step" in str(caught.value.hint)


def test_keys_follow_tokens_and_tokenizer(project: Project) -> None:
    """Other tokens, other descriptions, other content of a file: other configurations."""

    def key(step: str) -> str:
        return str(project.resolve(f"steps: [{step}]\n").key)

    a = key('{grow: vocabulary, tokens: ["<a>"]}')
    assert a == key('{grow: vocabulary, tokens: ["<a>"]}')
    assert len({a, key('{grow: vocabulary, tokens: ["<b>"]}'), key('{grow: vocabulary, tokens: {"<a>": w1}}')}) == 3
    (project.path / "words.txt").write_text("<a>\n", "utf-8")
    first = key("{grow: vocabulary, file: words.txt}")
    (project.path / "words.txt").write_text("<a>\n<b>\n", "utf-8")
    assert key("{grow: vocabulary, file: words.txt}") != first


BAD: list[tuple[str, str]] = [
    ('tokens: ["<new>", w3, is]', r"'w3' already exists as token 5 \(2 of 3 tokens exist\)"),
    ('tokens: ["<a>", "<a>"]', "'<a>' is listed twice"),
    ('tokens: [" "]', "an empty token"),
    ("rows: mean", "expected one of `tokens"),
    ('tokens: {"<a>": "unheard words"}', "the description 'unheard words' of '<a>' has no known token"),
    ("file: none.txt", "none.txt"),
    ("file: bad.jsonl", r'bad.jsonl:2: expected {"token"'),
    ("file: empty.txt", "empty.txt: the file has no token"),
    ("file: twice.txt", "twice.txt:2: '<a>' is listed twice"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_refused(fields: str, message: str, project: Project) -> None:
    (project.path / "bad.jsonl").write_text(json.dumps({"token": "<a>"}) + "\n{}\n", "utf-8")
    (project.path / "empty.txt").write_text("\n", "utf-8")
    (project.path / "twice.txt").write_text("<a>\n<a>\n", "utf-8")
    with pytest.raises(WorkbenchError, match=message) as caught:
        project.resolve(f"steps: [{{grow: vocabulary, {fields}}}]\n")
    assert caught.value.exit_code == 2


def test_a_recipe_with_other_tokens_is_no_brick(project: Project) -> None:
    inner: dict[str, Any] = {"name": "inner.yaml"}
    project.write('steps: [{grow: vocabulary, tokens: ["<a>"]}]\n', **inner)
    with pytest.raises(WorkbenchError, match="recipe inner cannot be a brick: it grows the base"):
        plan(project.resolve("bricks: {inner: {recipe: recipes/inner.yaml}}\nsteps: [{merge: average}]\n"), project.path / "runs")

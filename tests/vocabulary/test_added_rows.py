"""Adapters with rows of added tokens, against PEFT's own models; what cannot be taken exactly is refused with what to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.commands import call, document, refused
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import config, save_adapter, tensors_of
from worlds.token_words import BASE, EMBED, HEAD, OTHER, recipe, save_llama, save_random, save_words, tensors_in_memory

from workbench.ground.errors import WorkbenchError
from workbench.run.materialize import materialize

CHAT = ["<im_start>", "<im_end>"]
STEPS = "steps: [{merge: task_arithmetic}]\n"
TEXT = "w0 <im_start> w2 <im_end> w296"
KINDS: dict[str, dict[str, Any]] = {
    "saved with resized rows": {},
    "trainable_token_indices": {"trainable_token_indices": [299, 300, 301]},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "modules_to_save of the embeddings": {"modules_to_save": ["embed_tokens"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "DoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
}


def trained(base: Path, out: Path, words: Sequence[str], seed: int = 1, **settings: Any) -> Any:
    """PEFT's model of an adapter on a base with rows for these words, which is saved with its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(words) > model.config.vocab_size:
        model.resize_token_embeddings(len(words), mean_resizing=False)
    tuned: Any = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(out)
    save_words(out, words)
    return tuned.eval()


def logits(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([list(ids)])).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [300, 304], ids=["resized", "in padding"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_merged_model_is_that_of_peft(kind: str, rows: int, tied: bool, tmp_path: Path) -> None:
    """On text with the new tokens; two adapters of a tied model, which `merge_and_unload` adds to one tensor, as in the forward pass."""
    (tmp_path / "recipes").mkdir()
    base = save_llama(tmp_path / "base", BASE, tied=tied, rows=rows)
    peft = trained(base, tmp_path / "chat", [*BASE, *CHAT], **KINDS[kind])
    takes_block = rows == 304 and not KINDS[kind]  # nothing of the vocabulary is trained: the base's tokenizer, with a warning
    text = f"bricks: {{chat: chat}}\n{STEPS}" + "tokenizer: {source: chat}\n" * takes_block
    resolved = Project(tmp_path).resolve(text)
    ids = resolved.vocabulary.tokens
    assert [ids[word] for word in CHAT] == [300, 301]
    assert resolved.base.config["vocab_size"] == max(rows, 302)
    assert not any("the base's tokenizer is written" in warning for warning in resolved.warnings)
    if takes_block:
        plain = Project(tmp_path).resolve(f"bricks: {{chat: chat}}\n{STEPS}")
        assert plain.vocabulary is None
        assert "the base's tokenizer is written" in plain.warnings[0]
    read, found = [ids[word] for word in TEXT.split()], materialize(resolved, CPU)
    for expected in (peft, *([peft.merge_and_unload()] if not tied or "both" not in kind else [])):
        torch.testing.assert_close(logits(found, read), logits(expected, read), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "gemma2"])
def test_names_and_biases_of_other_families(family: str, tmp_path: Path) -> None:
    """gpt2 has other roots on disk, GPT-NeoX other names, phi a bias for each token, gemma2 a tied head."""
    from transformers import PhiConfig

    (tmp_path / "recipes").mkdir()
    small = PhiConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    base = save_random(tmp_path / "base", small if family == "phi" else config(family, layers=2), BASE)
    module = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}.get(family, "q_proj")
    peft = trained(base, tmp_path / "chat", [*BASE, *CHAT], target_modules=[module])
    resolved = Project(tmp_path).resolve(f"bricks: {{chat: chat}}\n{STEPS}")
    ids = [5, 300, 7, 301, 299]
    torch.testing.assert_close(logits(materialize(resolved, CPU), ids), logits(peft, ids), atol=2e-5, rtol=0)


def test_two_bricks_with_tokens_at_the_same_ids(words_project: Project, vocabularies: Path, tmp_path: Path) -> None:
    """Each token keeps the row of its adapter, at the union's id; a shared one has the mean; weights scale the base's rows alone."""
    from transformers import AutoTokenizer

    for number, tokens in enumerate((CHAT, ["<tool>", "<im_end>"])):
        trained(
            vocabularies / "base", tmp_path / f"a{number}", [*BASE, *tokens], number, modules_to_save=["embed_tokens", "lm_head"]
        )
    saved = [tensors_of(tmp_path / f"a{number}") for number in (0, 1)]
    first, second = ({key.removeprefix("base_model.model."): t for key, t in tensors.items()} for tensors in saved)
    out = Path(words_project.run("bricks: {a0: a0, a1: a1}\nsteps: [{merge: task_arithmetic, lambda: 0.5}]\n")["model"])
    ids, made, base = AutoTokenizer.from_pretrained(out).get_vocab(), tensors_of(out), tensors_of(vocabularies / "base")
    assert (ids["<im_start>"], ids["<tool>"], ids["<im_end>"]) == (300, 301, 302)
    for name in (EMBED, HEAD):
        assert torch.equal(made[name][300], first[name][300])
        assert torch.equal(made[name][301], second[name][300])
        torch.testing.assert_close(made[name][302], (first[name][301] + second[name][301]) / 2, atol=1e-7, rtol=0)
        expected = base[name] + 0.5 * (first[name][:300] - base[name]) + 0.5 * (second[name][:300] - base[name])
        torch.testing.assert_close(made[name][:300], expected, atol=1e-6, rtol=0)


REFUSED = {
    "no tokenizer": ("", "bricks: {chat: chat}\n" + STEPS, r"is \[302, 32\], the base has \[300, 32\] \(another vocabulary\)"),
    "no rows of the head": (
        HEAD, "bricks: {chat: chat}\n" + STEPS, r"lm_head.weight has 300 rows, model.embed_tokens.weight has 302 rows; expected one row per token",
    ),
    "as an adapter": (
        None, "bricks: {chat: chat}\n" + STEPS + "output: {form: adapter, rank: 4}\n", r"\(another vocabulary\)",
    ),
    "on the base": (None, "base: {adapter: chat, on: base}\nsteps: []\n", r"\(another vocabulary\)"),
    "a route": (None, "bricks: {chat: chat, two: chat}\nsteps: [{route: centroid, calibration: '{brick}.jsonl'}]\n", r"\(another vocabulary\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.part("upkeep")
def test_what_is_not_exact_is_refused(case: str, words_project: Project, vocabularies: Path, tmp_path: Path) -> None:
    """The hint's `brick bake` works with the tokenizer in the folder, and its checkpoint is used in all of these places."""
    from safetensors.torch import save_file

    from workbench.run.device import Work
    from workbench.upkeep.extract import bake

    without, text, message = REFUSED[case]
    trained(vocabularies / "base", tmp_path / "chat", [*BASE, *CHAT])
    for brick in ("chat", "two"):
        write_jsonl(tmp_path / f"{brick}.jsonl", [{"prompt": "w1", "answer": "w2"}])
    if without:
        tensors = {key: tensor for key, tensor in tensors_of(tmp_path / "chat").items() if not key.endswith(without)}
        save_file(tensors, tmp_path / "chat" / "adapter_model.safetensors")
    elif without is not None:
        (tmp_path / "chat" / "tokenizer.json").unlink()
    with pytest.raises(WorkbenchError, match=message) as caught:
        words_project.resolve(text)
    if case == "no rows of the head":
        assert "save_embedding_layers=True" in (caught.value.hint or "")
        return
    words = shlex.split(re.findall(r"workbench brick bake .*", caught.value.hint or "")[0])
    assert "the tokenizer that it was trained with" in (caught.value.hint or "")
    save_words(tmp_path / "chat", [*BASE, *CHAT])
    bake(words[3], words[5], tmp_path / "baked", Work(CPU), project=tmp_path)
    assert tensors_of(tmp_path / "baked")[EMBED].shape[0] == 302


def test_another_brick_s_tokens_are_kept_beside_an_adapter_that_lacks_some(
    words_project: Project, vocabularies: Path, tmp_path: Path
) -> None:
    save_adapter(vocabularies / "base", tmp_path / "adapter", seed=1, target_modules=["q_proj", "lm_head"])
    save_words(tmp_path / "adapter", BASE[:-1])
    resolved = words_project.resolve(f"bricks: {{adapter: adapter, third: third}}\n{STEPS}")
    assert resolved.vocabulary.plan.rows == 302
    assert [member.name for member in resolved.vocabulary.members] == ["base", "third"]


def test_such_a_brick_is_shown_and_verified(words_project: Project, cwd: Path, vocabularies: Path, tmp_path: Path) -> None:
    """It is merged with its rows; beside bricks of the base's vocabulary it is refused."""
    trained(vocabularies / "base", tmp_path / "chat", [*BASE, *CHAT], modules_to_save=["embed_tokens", "lm_head"])
    assert "chat: 4 tensors fit base" in call("brick", "verify", "chat", "--base", "base").stdout
    rows = {row["name"]: row for row in document("brick", "show", "chat", "--base", "base")["delta"]["tensors"]}
    saved = tensors_of(tmp_path / "chat")[f"base_model.model.{EMBED}"][:300] - tensors_of(vocabularies / "base")[EMBED]
    assert rows[EMBED]["norm"] == pytest.approx(float(saved.norm()), rel=1e-5)
    assert "(another vocabulary)" in refused("brick", "show", "chat", "third", "--base", "base").message


def test_rows_beside_a_changed_table_are_refused(words_project: Project, vocabularies: Path, tmp_path: Path) -> None:
    """Trained rows replace rows of the saved table, so that the sum of both deltas would be another matrix."""
    from safetensors.torch import save_file

    trained(vocabularies / "base", tmp_path / "chat", [*BASE, *CHAT], trainable_token_indices=[300, 301])
    tensors = tensors_of(tmp_path / "chat")
    (table,) = (key for key in tensors if key.endswith("embed_tokens.token_adapter.base_layer.weight"))
    save_file({**tensors, table: tensors[table] + 0.01}, tmp_path / "chat" / "adapter_model.safetensors")
    with pytest.raises(WorkbenchError, match=r"has both trained tokens and another update on model.embed_tokens.weight"):
        words_project.resolve(f"bricks: {{chat: chat}}\n{STEPS}")


def test_a_plan_of_an_adapter_on_the_head(words_project: Project, cwd: Path, vocabularies: Path, tmp_path: Path) -> None:
    """One of the base's vocabulary in a union is planned on the rows on which it is merged. Moved tokens are refused with a block, too."""
    save_adapter(vocabularies / "base", tmp_path / "adapter", seed=1, target_modules=["q_proj", "lm_head"])
    steps, bricks = "steps: [{merge: tsv, bricks: [adapter]}]\n", "bricks: {adapter: adapter, other: other}\n"
    file = words_project.write(recipe("{source: union}", steps, bricks))
    assert document("plan", str(file))["problems"] == []
    assert tensors_in_memory(words_project.resolve(recipe("{source: union}", steps, bricks)))[HEAD].shape == (304, 32)
    save_words(tmp_path / "adapter", OTHER)
    error = refused("plan", str(file))
    assert "the tokenizer in its directory differs from the base's: 297 tokens at other ids" in error.message

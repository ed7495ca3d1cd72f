"""Pruned heads: the smaller model computes what the larger one computes without the outputs of the heads that go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.growing import logits_of, save_family
from worlds.project import CPU, Project
from worlds.texts import words_tokenizer, write_rows
from worlds.tiny import VOCABULARY, live

from workbench.ground.errors import WorkbenchError
from workbench.run.compose import compose
from workbench.run.plan import plan

TOKENS = torch.randint(2, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


@pytest.fixture
def unfitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the outputs of the heads that remain as they are."""
    monkeypatch.setattr("workbench.grow.expansion.smaller.refitted", lambda matrix, _moments, kept: matrix[:, kept])


@pytest.fixture
def texts(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Return a project with texts.jsonl."""
    write_rows(project.path / "texts.jsonl", 12)
    monkeypatch.setattr("workbench.run.kinds.grow.load_tokenizer", words_tokenizer)
    return project


def without(model: Any, kept: list[list[int]], width: int) -> torch.Tensor:
    """Return the logits of a model whose attention writes nothing for the channels of removed groups of heads."""

    def masked(numbers: list[int]) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            grouped = args[0].reshape(*args[0].shape[:-1], -1, width)
            mask = torch.zeros(grouped.shape[-2], 1, dtype=grouped.dtype)
            mask[numbers] = 1
            return ((grouped * mask).reshape(args[0].shape),)

        return hook

    for layer, numbers in zip(model.model.layers, kept, strict=True):
        attention = layer.self_attn
        out = next(getattr(attention, name) for name in ("o_proj", "dense") if hasattr(attention, name))
        out.register_forward_pre_hook(masked(numbers))
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", ["phi3", "llama", "cohere", "starcoder2", "phi"])
@pytest.mark.usefixtures("unfitted")
def test_the_rest_computes_as_if_the_others_wrote_nothing(family: str, texts: Project) -> None:
    """The heads that go have outputs here. The reference masks them in the larger model, in float64."""
    base = save_family(family, texts.path / family, GROUPS)
    document = texts.run(f"base: {base}\nsteps: [{{grow: prune, heads: 0.5, calibration: texts.jsonl}}]\n")
    record, after = document["steps"][0], live(document["model"]).double()
    assert record["key_value_heads"] == [4, 2]
    assert (after.config.num_attention_heads, after.config.num_key_value_heads) == (4, 2)
    before = live(base).double()
    kept = kept_groups(before, after)
    assert len({tuple(numbers) for numbers in kept}) > 1, "layers keep different heads"
    with torch.no_grad():
        expected = without(before, kept, 16)
        found = after(TOKENS, use_cache=False).logits
    assert float((expected - found).abs().max()) <= 1e-9
    with torch.no_grad():
        assert float((live(base).double()(TOKENS).logits - found).abs().max()) > 1e-3, "the heads that go did something"


def kept_groups(before: Any, after: Any) -> list[list[int]]:
    """Return the groups of heads that each layer kept, found from the columns of the output matrices."""
    kept = []
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        name = "o_proj" if hasattr(old.self_attn, "o_proj") else "dense"
        olds, news = (getattr(layer.self_attn, name).weight.split(16, 1) for layer in (old, new))
        kept.append([next(i for i, part in enumerate(olds) if torch.equal(part, group)) for group in news])
    return kept


def test_fitted_outputs_move_with_their_layers(texts: Project) -> None:
    """A list that removes the first layer, in one step with heads and neurons or after them."""
    base = save_family("llama", texts.path / "llama", GROUPS)
    less, first = "neurons: 0.25, heads: 0.5, calibration: texts.jsonl", "grow: prune, layers: [0]"
    both, apart = (
        texts.tensors(f"base: {base}\nsteps: [{steps}]\n")
        for steps in (f"{{{first}, {less}}}", f"{{grow: prune, {less}}}, {{id: second, {first}}}")
    )
    assert both.keys() == apart.keys()
    assert all(torch.equal(tensor, apart[name]) for name, tensor in both.items())


@pytest.mark.usefixtures("unfitted")
def test_rows_of_the_stacked_matrix(texts: Project) -> None:
    """Queries, keys and values of Phi-3 lie one after the other: of each, the rows of the groups that remain."""
    base = save_family("phi3", texts.path / "phi3", GROUPS)
    document = texts.run(f"base: {base}\nsteps: [{{grow: prune, heads: 0.25, calibration: texts.jsonl}}]\n")
    before, after = live(base), live(document["model"])
    for layer, numbers in enumerate(kept_groups(before, after)):
        assert len(numbers) == 3
        queries, keys, values = before.model.layers[layer].self_attn.qkv_proj.weight.split([64, 32, 32])
        expected = [
            *(queries[g * 16 : (g + 1) * 16] for g in numbers),
            *(keys[g * 8 : (g + 1) * 8] for g in numbers),
            *(values[g * 8 : (g + 1) * 8] for g in numbers),
        ]
        assert torch.equal(after.model.layers[layer].self_attn.qkv_proj.weight, torch.cat(expected))


def test_a_stacked_matrix_gets_more_heads(project: Project) -> None:
    """Width adds heads to Phi-3, and the function stays."""
    base = save_family("phi3", project.path / "phi3")
    document = project.run(f"base: {base}\nsteps: [{{grow: width, key_value_heads: 4}}]\n")
    assert document["steps"][0]["key_value_heads"] == [2, 4]
    old, new = (live(place).model.layers[0].self_attn.qkv_proj.weight for place in (base, document["model"]))
    for before, after in zip(old.split([32, 16, 16]), new.split([64, 32, 32]), strict=True):
        assert torch.equal(after[: len(before)], before)
        assert torch.cdist(after[len(before) :], old).min() > 0.1, "new rows are no copies"
    assert float((logits_of(base, TOKENS) - logits_of(document["model"], TOKENS)).abs().max()) <= 1e-5


COMPUTED = {
    "gpt2": r"gpt2 as n_embd / n_head \(32 / 4 = 8\)",
    "gpt_neox": r"gpt_neox as hidden_size / num_attention_heads \(32 / 4 = 8\)",
    "bloom": r"bloom as hidden_size / n_head \(32 / 4 = 8\)",
    "falcon": r"falcon as hidden_size / num_attention_heads \(32 / 4 = 8\)",
    "stablelm": r"stablelm as hidden_size / num_attention_heads \(32 / 4 = 8\)",
    "opt": r"opt as hidden_size / num_attention_heads \(32 / 4 = 8\)",
}


@pytest.mark.parametrize("family", COMPUTED)
def test_the_field_that_config_json_lacks(family: str, texts: Project, dense_of: Callable[[str], Path]) -> None:
    """The message names the fields that the channels of a head follow from, for both directions."""
    base = dense_of(family)
    message = f"transformers computes the channels of a head of model_type {COMPUTED[family]}, because its config.json has no `head_dim`"
    with pytest.raises(WorkbenchError, match=f"grow prune: {message}") as caught:
        plan(
            texts.resolve(f"base: {base}\nsteps: [{{grow: prune, heads: 0.5, calibration: texts.jsonl}}]\n"),
            texts.path / "runs",
        )
    assert caught.value.exit_code == 2
    assert caught.value.hint == "Prune `layers` or `neurons` instead."
    with pytest.raises(WorkbenchError, match=f"grow width: {message}"):
        compose(texts.resolve(f"base: {base}\nsteps: [{{grow: width, key_value_heads: 8}}]\n"), CPU)

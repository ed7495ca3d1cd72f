"""Bricks with other vocabularies: rows aligned by token, by hand and against mergekit; adapters and recipes among them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worlds.project import Project
from worlds.tiny import config, edit_json, save_adapter, tensors_of
from worlds.token_words import (
    BASE,
    EMBED,
    HEAD,
    MIX,
    OTHER,
    THIRD,
    TWO,
    by_token,
    input_rows,
    recipe,
    save_llama,
    save_random,
    save_tuned,
    save_words,
    tensors_in_memory,
)

import workbench.weights.row_alignment as rows_module
from workbench.ground.errors import WorkbenchError
from workbench.vocabulary.tokens import read_tokens
from workbench.weights.specs import load

# -- mergekit


def mergekit_rows(words_project: Project, place: str, method: str, tokenizer: dict[str, Any], parameters: dict[str, Any],
                  weights: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, int]]:  # fmt: skip
    """mergekit's own merge in float32: tensors, and ids of its tokens."""
    run = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    at = words_project.path / place

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: named(v) for k, v in value.items()}
        return str(at / value) if value in ("other", "third") or (value == "base" and (at / "base").is_dir()) else value

    source = tokenizer.get("source")
    block = named(tokenizer) | {"source": source if source in ("base", "union") else str(at / str(source))}
    if method == "linear":
        weights = {"base": 0.0, **weights}  # it wants one for the base too
    data = {"merge_method": method, "base_model": str(at / "base"), "dtype": "float32", "parameters": parameters, "tokenizer": block,
            "models": [{"model": str(at / n), "parameters": {"weight": w}} for n, w in weights.items()]}  # fmt: skip
    out = words_project.path / "mergekit"
    run.run_merge(MergeConfiguration.model_validate(data), str(out), MergeOptions(quiet=True))
    return tensors_of(out), read_tokens(out, "mergekit").ids


MERGES = {
    "task_arithmetic": ({"lambda": 0.9}, MIX),
    "linear": ({"normalize": True}, "steps: [{merge: linear, bricks: {other: 0.6, third: 0.7}}]\n"),
    "ties": (
        {"density": 0.5, "lambda": 0.9, "normalize": True},
        "steps: [{merge: ties, bricks: {other: 0.6, third: 0.7}, density: 0.5, lambda: 0.9, weigh: before, divide: weight}]\n",
    ),
}


@pytest.mark.parametrize(
    ("method", "source", "place"),
    [
        ("task_arithmetic", "union", "."),
        ("task_arithmetic", "base", "."),
        ("task_arithmetic", "other", "."),
        ("linear", "union", "."),
        ("linear", "other", "tied"),
        ("ties", "union", "."),
        ("ties", "base", "tied"),
    ],
)
def test_mergekit(words_project: Project, method: str, source: str, place: str) -> None:
    parameters, steps = MERGES[method]
    theirs, their_ids = mergekit_rows(words_project, place, method, {"source": source}, parameters, {"other": 0.6, "third": 0.7})
    prefix = "" if place == "." else f"{place}/"
    text = recipe(f"{{source: {source}}}", steps, f"bricks: {{other: {prefix}other, third: {prefix}third}}\n")
    resolved = words_project.resolve(f"base: {prefix}base\n{text}")
    ours = tensors_in_memory(resolved)
    ids = read_tokens(resolved.tokenizer_path, "ours").ids
    assert set(ids) == set(their_ids)
    assert set(ours) == set(theirs) - ({HEAD} if place == "tied" else set())
    for name in ours:
        mine, other = ours[name], theirs[name]
        if name in (EMBED, HEAD):
            mine, other = (torch.stack([t[table[token]] for token in ids]) for t, table in ((mine, ids), (other, their_ids)))
        assert float((mine - other).abs().max()) <= 1e-6, name


def test_mergekit_rules(words_project: Project) -> None:
    """Zero, another token's row, force, a token that nobody had, and rows rounded up."""
    theirs, their_ids = mergekit_rows(
        words_project, ".", "task_arithmetic",
        {"source": "union", "pad_to_multiple_of": 64, "tokens": {
            "x0": {"source": {"kind": "zero"}},
            "x1": {"source": {"kind": "model_token", "model": "third", "token": "w5"}},
            "w7": {"source": "other", "force": True},
            "w8": {"source": {"kind": "zero"}, "force": True},
            "fresh": {"source": {"kind": "model_token", "model": "base", "token_id": 11}},
        }},
        {"lambda": 0.9}, {"other": 0.6, "third": 0.7})  # fmt: skip
    resolved = words_project.resolve(
        recipe(
            "{source: union, pad_to_multiple_of: 64, tokens: {x0: {source: zero}, x1: {source: {model: third, token: w5}}, "
            "w7: {source: other, force: true}, w8: {source: zero, force: true}, fresh: {source: {model: base, token_id: 11}}}}"
        )
    )
    ours, ids = tensors_in_memory(resolved), read_tokens(resolved.tokenizer_path, "ours").ids
    assert len(ours[EMBED]) == len(theirs[EMBED]) == 320
    assert set(ids) == set(their_ids)
    for token in ids:
        assert float((ours[EMBED][ids[token]] - theirs[EMBED][their_ids[token]]).abs().max()) <= 1e-6, token
    assert float((ours[HEAD][len(ids) :] - theirs[HEAD][len(ids) :]).abs().max()) <= 1e-6  # padding


# -- rows by hand


ARCS = {
    "slerp": "steps: [{merge: slerp, bricks: {other: 0.4, third: 0.6}, parallel: 1}]\n",
    "karcher": "steps: [{merge: mergekit/karcher, bricks: [other, third]}]\n",
    "nuslerp": "steps: [{merge: mergekit/nuslerp, bricks: {other: 0.4, third: 0.6}, with_base: false}]\n",
    "multislerp": "steps: [{merge: mergekit/multislerp, bricks: {other: 0.4, third: 0.6}, with_base: false}]\n",
}


@pytest.mark.parametrize("method", ARCS)
def test_rows_of_one_models_tokens_keep_their_length_along_an_arc(
    words_project: Project, vocabularies: Path, method: str
) -> None:
    """x0 and x1 are `other`'s alone, y0 is `third`'s: rows of both in the result, bit for bit. Shared tokens are interpolated."""
    resolved = words_project.resolve("base: base\n" + recipe("{source: union}", ARCS[method]))
    found, ids = tensors_in_memory(resolved), read_tokens(resolved.tokenizer_path, "t").ids
    owners = {"other": OTHER, "third": THIRD}
    loaded = {name: tensors_of(vocabularies / name) for name in owners}
    alone = {t: n for n in owners for t in owners[n] if t not in BASE and sum(t in v for v in owners.values()) == 1}
    assert set(alone.values()) == {"other", "third"}
    for tensor in (EMBED, HEAD):
        for token, owner in alone.items():
            assert torch.equal(found[tensor][ids[token]], loaded[owner][tensor][owners[owner].index(token)]), (tensor, token)
        shared = ids["w5"]
        rows = [loaded[name][tensor][owners[name].index("w5")] for name in owners]
        assert not any(torch.equal(found[tensor][shared], row) for row in rows)


def test_an_adapter_may_change_the_rows_of_the_bases_own_tokens(words_project: Project, vocabularies: Path) -> None:
    """Only rows that all models share stay: an adapter without tokens of its own changes those of the base alone."""
    save_adapter(vocabularies / "base", words_project.path / "adapter", seed=7, target_modules=["embed_tokens"])
    bricks = "bricks: {adapter: adapter, other: other}\n"
    resolved = words_project.resolve(
        recipe("{source: union}", "steps: [{merge: slerp, bricks: {adapter: 0.5, other: 0.5}}]\n", bricks)
    )
    ids, vocabulary = read_tokens(resolved.tokenizer_path, "t").ids, resolved.vocabulary
    kept = vocabulary.equal_rows(["adapter", "other"])
    assert {token for token, i in ids.items() if kept[i]} == {token for token in OTHER if token not in BASE}
    assert {t for t, i in ids.items() if vocabulary.equal_rows(["other"])[i]} >= {token for token in BASE if token not in OTHER}


def test_union_rows(words_project: Project, vocabularies: Path) -> None:
    """A token of the base, of one brick, of two bricks: base + Σwτ over the bricks that have it, the owner's row, the mean."""
    resolved = words_project.resolve(recipe("{source: union}"))
    ids = read_tokens(resolved.tokenizer_path, "t").ids
    assert {t: ids[t] for t in BASE} == {t: i for i, t in enumerate(BASE)}
    assert {t: ids[t] for t in ids if t not in BASE} == {"<new>": 300, "x0": 301, "x1": 302, "x2": 303, "y0": 304}
    for tensor in (EMBED, HEAD):
        rows = by_token(tensors_in_memory(resolved)[tensor], ids)
        base, other, third = (input_rows(vocabularies, n, tensor) for n in ("base", "other", "third"))
        assert torch.allclose(
            rows["w3"], base["w3"] + 0.9 * (0.6 * (other["w3"] - base["w3"]) + 0.7 * (third["w3"] - base["w3"])), atol=1e-6
        )
        assert torch.allclose(rows["w296"], base["w296"] + 0.63 * (third["w296"] - base["w296"]), atol=1e-6)  # other lacks it
        assert torch.equal(rows["x0"], other["x0"])
        assert torch.equal(rows["y0"], third["y0"])
        mean = (other["x1"] + third["x1"]) / 2
        expected = mean + 0.9 * (0.6 * (other["x1"] - mean) + 0.7 * (third["x1"] - mean))
        assert torch.allclose(rows["x1"], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_vocabulary_does_not_matter(words_project: Project, tmp_path: Path, dtype: torch.dtype) -> None:
    """A brick whose vocabulary is the base's in another order, with its rows moved along, merges to the same bits."""
    from safetensors.torch import save_file

    base = save_llama(tmp_path / "plain", BASE, dtype=dtype)
    straight = save_tuned(base, tmp_path / "straight", BASE, BASE, seed=5)
    shuffled = shutil.copytree(straight, tmp_path / "shuffled")
    order = np.random.default_rng(0).permutation(len(BASE))
    tensors = tensors_of(straight)
    save_file(
        {n: t[torch.from_numpy(order)].contiguous() if n in (EMBED, HEAD) else t for n, t in tensors.items()},
        shuffled / "model.safetensors",
    )
    words = [BASE[i] for i in order]
    save_words(shuffled, words)
    edit_json(shuffled / "config.json", eos_token_id=words.index("<eos>"), pad_token_id=words.index("<pad>"))
    for method in ("average", "ties", "task_arithmetic"):
        text = f"steps: [{{merge: {method}}}]\n"
        expected = words_project.tensors(f"base: plain\nbricks: {{one: straight}}\n{text}", None)
        found = words_project.tensors("base: plain\n" + recipe("{source: base}", text, "bricks: {one: shuffled}\n"), None)
        assert found[EMBED].dtype == dtype
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_order_of_bricks_and_controls(words_project: Project) -> None:
    """Names and order of the bricks change neither ids nor bits."""
    one = words_project.resolve(recipe("{source: union}", "steps: [{merge: ties}]\n", "bricks: {a: other, b: third}\n"))
    two = words_project.resolve(recipe("{source: union}", "steps: [{merge: ties}]\n", "bricks: {c: third, d: other}\n"))
    assert one.tokenizer_path == two.tokenizer_path
    first, second = tensors_in_memory(one), tensors_in_memory(two)
    assert all(torch.equal(first[n], second[n]) for n in first)
    # The base and a brick alone, as they are scored beside a recipe, have its tokenizer.
    from workbench.evaluate.lineup import lineup

    resolved = words_project.resolve(recipe("{source: other}"))
    found = lineup([resolved.recipe])
    assert [entry.name for entry in found] == ["base", "other", "third", "average", "test"]
    assert {entry.resolved.vocabulary.digest for entry in found} == {resolved.vocabulary.digest}


def test_no_need_no_change(words_project: Project, vocabularies: Path, tmp_path: Path) -> None:
    """With equal vocabularies the block changes no byte of the weights and no tokenizer file."""
    save_tuned(vocabularies / "base", tmp_path / "same", BASE, BASE, seed=6)
    steps = "steps: [{merge: average}]\n"
    plain = words_project.run(f"bricks: {{same: same}}\n{steps}", "plain.yaml")
    block = words_project.run(recipe("{source: union}", steps, "bricks: {same: same}\n"), "block.yaml")
    assert plain["key"] != block["key"]
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (Path(plain["model"]) / name).read_bytes() == (Path(block["model"]) / name).read_bytes()


@pytest.mark.parametrize("source", ["union", "base", "third"])
def test_scattered_rows_are_read_whole(words_project: Project, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by run or from a tensor in memory, rows of other models too: the same bits."""
    resolved = words_project.resolve(recipe(f"{{source: {source}}}"))
    expected = tensors_in_memory(resolved)
    assert resolved.vocabulary.memory() == 0
    for runs, length in ((2, rows_module._SHORT_RUN), (0, 10**6)):
        monkeypatch.setattr(rows_module, "_MANY_RUNS", runs)
        monkeypatch.setattr(rows_module, "_SHORT_RUN", length)
        found = tensors_in_memory(resolved)
        assert resolved.vocabulary.memory() > 0
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_padding_rows_are_kept(words_project: Project, vocabularies: Path, tmp_path: Path) -> None:
    """A base with more rows than tokens, in bf16: no row is cut off, and an added token takes the first one that is free."""
    base = save_llama(tmp_path / "padded", BASE, rows=320, dtype=torch.bfloat16)
    save_tuned(base, tmp_path / "tuned", BASE, [*BASE, "z"], seed=7, rows=320)
    text = recipe("{source: union}", "steps: [{merge: task_arithmetic}]\n", "bricks: {tuned: tuned}\n")
    resolved = words_project.resolve(f"base: padded\n{text}")
    made, old, tuned = tensors_in_memory(resolved, None), tensors_of(base), tensors_of(tmp_path / "tuned")
    assert read_tokens(resolved.tokenizer_path, "t").ids["z"] == 300
    assert made[EMBED].shape == (320, 32)
    assert made[EMBED].dtype == torch.bfloat16
    assert torch.equal(made[EMBED][300], tuned[EMBED][300])
    assert torch.equal(made[EMBED][301:], (old[EMBED].float() + (tuned[EMBED].float() - old[EMBED].float())).bfloat16()[301:])
    cut = words_project.resolve(f"base: padded\n{recipe('{source: third}', MIX, TWO.replace('other: other', 'other: tuned'))}")
    assert len(tensors_in_memory(cut)[EMBED]) == len(THIRD)  # the choice's own number of rows


def test_every_block_size_gives_the_same_rows(
    words_project: Project, vocabularies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, or all at once."""
    import workbench.weights.specs as specs

    text = recipe("{source: other, pad_to_multiple_of: 16}")
    view = words_project.resolve(text).vocabulary.view("third")
    expected = load(view, EMBED, torch.float32)
    monkeypatch.setattr(specs, "BLOCK_ELEMENTS", 32)
    assert torch.equal(load(words_project.resolve(text).vocabulary.view("third"), EMBED, torch.float32), expected)


def test_forced_mean(words_project: Project, vocabularies: Path) -> None:
    """`source: mean` over the models that have the token; forced, it is what every method returns."""
    resolved = words_project.resolve(
        recipe("{source: base, tokens: {w3: {source: mean, force: true}, w296: {source: mean, force: true}}}")
    )
    rows = by_token(tensors_in_memory(resolved)[EMBED], read_tokens(resolved.tokenizer_path, "t").ids)
    base, other, third = (input_rows(vocabularies, n) for n in ("base", "other", "third"))
    assert torch.allclose(rows["w3"], (base["w3"] + other["w3"] + third["w3"]) / 3, atol=1e-6)
    assert torch.allclose(rows["w296"], (base["w296"] + third["w296"]) / 2, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "gemma2", "qwen2", "phi"])
def test_families(words_project: Project, tmp_path: Path, family: str) -> None:
    """Embeddings, heads and a head's bias under each family's names; then a grown layer. Nothing else changes its rows."""
    from transformers import AutoModelForCausalLM, PhiConfig

    settings = (
        PhiConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, bos_token_id=None)
        if family == "phi"
        else config(family)
    )
    base = save_random(tmp_path / "plain", settings, BASE)
    tuned = save_tuned(base, tmp_path / "tuned", BASE, THIRD, seed=1)
    text = recipe("{source: union}", "steps: [{merge: task_arithmetic}, {grow: depth, blocks: 1}]\n", "bricks: {tuned: tuned}\n")
    out = Path(words_project.run(f"base: plain\n{text}")["model"])
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.vocab_size == 302
    made, old, new = tensors_of(out), tensors_of(base), tensors_of(tuned)
    resized = {name for name, tensor in old.items() if len(tensor) == 300}
    assert len(resized) == {"gpt2": 1, "gpt_neox": 2, "phi": 3}.get(family, 1)
    for name, tensor in old.items():
        assert made[name].shape == ((302, *tensor.shape[1:]) if name in resized else tensor.shape)
    for name in resized:
        torch.testing.assert_close(made[name], new[name], atol=1e-6, rtol=0)
        assert torch.equal(made[name][300:], new[name][300:])


# -- adapters and recipes as bricks


@pytest.mark.parametrize("method", ["task_arithmetic", "ties, density: 1.0", "linear"])
def test_adapter_on_the_head(words_project: Project, vocabularies: Path, tmp_path: Path, method: str) -> None:
    """An adapter of the base's vocabulary that updates the head, in a union: its delta on the base's rows, none on new ones."""
    save_adapter(vocabularies / "base", tmp_path / "adapter", seed=1, target_modules=["q_proj", "lm_head"])
    steps = f"steps: [{{merge: {method}, bricks: {{adapter: 1.0}}}}]\n"
    alone = words_project.tensors(f"bricks: {{adapter: adapter}}\n{steps}")
    found = words_project.tensors(recipe("{source: union}", steps, "bricks: {adapter: adapter, other: other}\n"))
    assert not torch.equal(alone[HEAD], tensors_of(vocabularies / "base")[HEAD])
    assert torch.equal(found[HEAD][:300], alone[HEAD])
    assert torch.equal(
        found[HEAD][300:], torch.stack([input_rows(vocabularies, "other", HEAD)[t] for t in ("<new>", "x0", "x1", "x2")])
    )
    moved = words_project.tensors(recipe("{source: other}", steps, "bricks: {adapter: adapter, other: other}\n"))
    assert torch.allclose(moved[HEAD][OTHER.index("w9")], alone[HEAD][BASE.index("w9")], atol=1e-6)


def test_recipe_as_brick(words_project: Project, vocabularies: Path, tmp_path: Path) -> None:
    """A recipe on the same base, without a block, is aligned like the base; one with its own block is refused."""
    save_tuned(vocabularies / "base", tmp_path / "same", BASE, BASE, seed=6)
    words_project.write("bricks: {same: same}\nsteps: [{merge: task_arithmetic, bricks: {same: 0.5}}]\n", "inner.yaml")
    steps = "steps: [{merge: task_arithmetic, bricks: {inner: 1.0}}]\n"
    bricks = "bricks: {inner: {recipe: recipes/inner.yaml}, other: other}\n"
    found = words_project.tensors(recipe("{source: union}", steps, bricks))
    inner = words_project.tensors("bricks: {same: same}\nsteps: [{merge: task_arithmetic, bricks: {same: 0.5}}]\n")
    assert torch.allclose(found[EMBED][:300], inner[EMBED], atol=1e-6)
    assert torch.equal(found[EMBED][300], input_rows(vocabularies, "other")["<new>"])
    words_project.write(recipe("{source: union}"), "inner.yaml")
    with pytest.raises(WorkbenchError, match=r"the `tokenizer` block of recipe .* differs from this recipe's"):
        words_project.resolve(recipe("{source: union}", steps, bricks))
    block = "tokenizer: {tokens: {gained: {source: zero}}}\n"
    words_project.write(block + "bricks: {same: same}\nsteps: [{merge: average}]\n", "inner.yaml")
    steps += "bricks: {inner: {recipe: recipes/inner.yaml}}\n"
    with pytest.raises(WorkbenchError, match="recipe inner changes the vocabulary; this recipe has none") as caught:
        words_project.resolve(steps)
    assert str(caught.value.hint).startswith("Move the block here")
    words_project.write("bricks: {same: same}\nsteps: [{merge: average}]\n", "inner.yaml")
    assert words_project.resolve(steps + block).vocabulary is not None

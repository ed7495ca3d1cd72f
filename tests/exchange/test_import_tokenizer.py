"""`workbench recipe import` of `tokenizer_source`, `tokenizer` and `chat_template`, with inputs whose vocabularies differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from worlds.mergekit_runs import difference, imported, run_mergekit
from worlds.project import CPU
from worlds.tiny import edit_json, save_finetuned, save_model, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.recipe.schema import RecipeFields

EMBED = "model.embed_tokens.weight"
ALIGNS = "tokenizer" in RecipeFields.model_fields
HEAD = """\
merge_method: task_arithmetic
base_model: base
models: [{model: one, parameters: {weight: 0.6}}, {model: two, parameters: {weight: 0.3}}]
dtype: float32
"""
RULES = """\
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    w3: {source: {kind: zero}, force: true}
    w4: {source: two, force: true}
    extra: {source: {kind: model_token, model: base, token: w5}}
    fresh: {source: {kind: model_token, model: one, token_id: 11}}
"""


@pytest.fixture
def folder(tmp_path: Path, cwd: Path) -> Path:
    """base, one with the same tokens, two with two words exchanged and one more; the working directory."""
    (tmp_path / "recipes").mkdir()
    save_model(tmp_path / "base", dtype=torch.float32)
    for seed, name in enumerate(("one", "two"), 1):
        save_finetuned(tmp_path / "base", tmp_path / name, seed=seed)
        (tmp_path / name / "tokenizer_config.json").write_bytes((tmp_path / "base" / "tokenizer_config.json").read_bytes())
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    save_file({**tensors, EMBED: torch.cat([tensors[EMBED], torch.ones(1, 32)])}, tmp_path / "two" / "model.safetensors")
    document = json.loads((tmp_path / "two" / "tokenizer.json").read_text("utf-8"))
    vocab = document["model"]["vocab"]
    vocab["w0"], vocab["w1"], vocab["extra"] = vocab["w1"], vocab["w0"], len(vocab)
    edit_json(tmp_path / "two" / "tokenizer.json", model=document["model"])
    edit_json(tmp_path / "two" / "config.json", vocab_size=len(vocab))
    return tmp_path


def by_token(model: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, its embeddings as one row a token."""
    document = json.loads((model / "tokenizer.json").read_text("utf-8"))
    ids = {**document["model"]["vocab"], **{t["content"]: t["id"] for t in document["added_tokens"]}}
    tensors = tensors_of(model)
    rows = tensors.pop(EMBED)
    return {**tensors, **{f"row {token}": rows[i] for token, i in ids.items()}, "rows": torch.tensor(float(len(rows)))}


def run(text: str, folder: Path) -> Path:
    """The directory that `workbench run` writes for a YAML's recipe."""
    from workbench.exchange.mergekit import import_recipe, write_imported
    from workbench.recipe.recipe import load_recipe
    from workbench.resolve.resolve import resolve
    from workbench.run.device import Work
    from workbench.run.execute import execute

    (folder / "merge.yml").write_text(text, "utf-8")
    to = folder / "recipes" / "merge.yaml"
    write_imported(import_recipe(folder / "merge.yml", to), to)
    result: dict[str, Any] = execute(resolve(load_recipe(to)), folder / "runs", Work(CPU, 1)).to_dict()
    return Path(result["model"])


@pytest.mark.parametrize(
    "block",
    ["tokenizer_source: union\n", "tokenizer_source: base\n", "tokenizer: {source: two}\n", RULES],
    ids=["union", "base", "brick", "rules"],
)
def test_vocabularies_that_differ(block: str, folder: Path) -> None:
    """Equal to mergekit, token by token, where recipes align vocabularies; refused by field where they do not."""
    if not ALIGNS:
        with pytest.raises(WorkbenchError, match=r"merge.yml:5:1 tokenizer(_source)?: \w+: the inputs' vocabularies differ"):
            run(HEAD + block, folder)
        return
    theirs = folder / "theirs"
    run_mergekit(yaml.safe_load(HEAD + block), theirs)
    assert difference(by_token(run(HEAD + block, folder)), by_token(theirs)) <= 1e-6


def test_one_vocabulary_needs_no_block(folder: Path) -> None:
    text = HEAD.replace(", {model: two, parameters: {weight: 0.3}}", "") + "tokenizer: {source: union}\n"
    ours, recipe, notes = imported(text, folder)
    assert difference(ours, run_mergekit(yaml.safe_load(text), folder / "theirs")) <= 1e-6
    assert "line 5, tokenizer: all inputs have the same vocabulary, so no row moves and it is omitted" in notes
    assert "\ntokenizer:" not in recipe


def test_rows_beyond_the_tokens_are_kept(folder: Path) -> None:
    """mergekit cuts them with any tokenizer_source; the rows of tokens are equal."""
    for name in ("base", "one"):
        tensors = load_file(folder / name / "model.safetensors")
        save_file({**tensors, EMBED: torch.cat([tensors[EMBED], torch.ones(8, 32)])}, folder / name / "model.safetensors")
        edit_json(folder / name / "config.json", vocab_size=72)
    text = HEAD.replace(", {model: two, parameters: {weight: 0.3}}", "") + "tokenizer_source: base\n"
    ours, _, notes = imported(text, folder)
    theirs = run_mergekit(yaml.safe_load(text), folder / "theirs")
    assert difference({**ours, EMBED: ours[EMBED][:64]}, theirs) <= 1e-6
    assert "line 5, tokenizer_source: mergekit cuts the 8 rows beyond the tokenizer's tokens, but the recipe keeps them" in notes


def test_a_chat_template_in_full_goes_along(folder: Path) -> None:
    text = HEAD.replace(", {model: two, parameters: {weight: 0.3}}", "") + "chat_template: \"{{ messages[0]['content'] }}\"\n"
    _, recipe, notes = imported(text, folder)
    assert ("tokenizer: {source: base, chat_template: '{{ messages[0]" in recipe) == ALIGNS
    assert any("chat_template: a template: not carried over" in note for note in notes) != ALIGNS


SLICES = """\
merge_method: METHOD
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 3]}EXTRA1]
  - sources: [{model: base, layer_range: [3, 4]}EXTRA2]
dtype: float32
"""


@pytest.mark.parametrize("block", ["tokenizer_source: union\n", "tokenizer_source: base\n", "tokenizer: {source: two}\n"])
@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_slices_with_vocabularies_that_differ(method: str, block: str, folder: Path) -> None:
    """Rows are aligned by token before slices are stacked or merged, as in mergekit."""
    extra = ", {model: MODEL, layer_range: [1, 2], parameters: {weight: 0.5}}"
    if method == "passthrough":
        text = SLICES.replace("EXTRA1", "").replace(
            "{model: base, layer_range: [3, 4]}EXTRA2", "{model: two, layer_range: [2, 4]}"
        )
    else:
        text = SLICES.replace("EXTRA1", ", {model: two, layer_range: [1, 4], parameters: {weight: 0.5}}")
        text = text.replace("EXTRA2", extra.replace("MODEL", "one")) + "parameters: {weight: 0.5}\n"
    text = text.replace("METHOD", method) + block
    run_mergekit(yaml.safe_load(text), folder / "theirs")
    ours, theirs = by_token(run(text, folder)), by_token(folder / "theirs")
    if method == "passthrough" and "row extra" in theirs:  # the first slice's model lacks the token, which a note says
        assert (float(theirs.pop("row extra").abs().max()), float(ours.pop("row extra").min())) == (0.0, 1.0)
    assert difference(ours, theirs) <= 1e-6

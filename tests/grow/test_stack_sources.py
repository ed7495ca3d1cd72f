"""`grow: stack` with layers of several models: tensors beside a direct computation, what is written, and bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document
from worlds.project import CPU, Project
from worlds.tiny import baked, edit_json, live, save_adapter, save_finetuned, save_model, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.run.compose import compose
from workbench.run.plan import plan

PLACES = {name: name for name in ("one", "two", "deep", "lora", "untied", "narrow", "heads", "qwen", "words", "mute")}
PLACES["mix"] = "{recipe: recipes/mix.yaml}"


def using(text: str) -> str:
    """A recipe with the bricks that its text names: bricks that no step uses must fit the base."""
    named = [f"{name}: {place}" for name, place in PLACES.items() if re.search(rf"\b{name}\b", text)]
    return f"base: base\nbricks: {{{', '.join(named)}}}\n{text}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and its fine-tune one (4 layers, float32, tied), deep (6 layers), an adapter, and an untied model of 4 layers."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "base", dtype=torch.float32)
    save_finetuned(folder / "base", folder / "one", seed=1)
    save_finetuned(folder / "base", folder / "two", seed=2)
    save_model(folder / "deep", dtype=torch.float32, seed=3, layers=6)
    save_model(folder / "untied", "llama_untied", dtype=torch.float32, seed=4)
    save_adapter(folder / "base", folder / "lora", seed=5)
    return folder


@pytest.fixture
def several(tmp_path: Path, models: Path) -> Project:
    """A project with these models, and a recipe `mix` that halves the difference of one from base."""
    project = Project.of(tmp_path, models)
    project.write("bricks: {one: one}\nsteps: [{merge: task_arithmetic, lambda: 0.5}]\n", "mix.yaml")
    return project


def layer(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_layers_of_checkpoints_adapters_and_recipes(several: Project, models: Path) -> None:
    """Each block is what its source holds; embeddings, norm and factors too; transformers loads what `run` writes."""
    step = """\
steps:
  - grow: stack
    slices:
      - {layers: [0, 2]}
      - {brick: deep, layers: [3, 6]}
      - {brick: lora, layers: [1, 2], scale: {"mlp.down_proj.*": 0.5}}
      - {brick: mix, layers: [3, 4]}
      - {layers: [1, 2]}
    embeddings: {brick: one, scale: {"*": 2.0}}
    norm: deep
"""
    done = several.run(using(step))
    ours, base, one, deep = tensors_of(Path(done["model"])), *(tensors_of(models / n) for n in ("base", "one", "deep"))
    with_lora = baked(models / "base", models / "lora")
    expected = [layer(base, 0), layer(base, 1), *(layer(deep, n) for n in (3, 4, 5))]
    for number, tensors in enumerate(expected):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in layer(ours, number).items())
    for name, tensor in layer(ours, 5).items():
        factor = 0.5 if name == "mlp.down_proj.weight" else 1.0
        assert torch.allclose(tensor, layer(with_lora, 1)[name] * factor, atol=1e-6)
    assert not torch.equal(layer(ours, 5)["self_attn.q_proj.weight"], layer(base, 1)["self_attn.q_proj.weight"])
    for name, tensor in layer(ours, 6).items():
        assert torch.allclose(tensor, (layer(base, 3)[name] + layer(one, 3)[name]) / 2, atol=1e-6)
    assert all(torch.equal(t, layer(base, 1)[n]) for n, t in layer(ours, 7).items())
    assert torch.equal(ours["model.embed_tokens.weight"], one["model.embed_tokens.weight"] * 2)
    assert torch.equal(ours["model.norm.weight"], deep["model.norm.weight"])
    assert "lm_head.weight" not in ours
    assert live(Path(done["model"])).config.num_hidden_layers == 8
    record = done["steps"][0]
    assert (record["new_layers"], record["gone_layers"], record["check"]["reloaded"]) == ([2, 3, 4, 5, 6, 7], [2, 3], True)
    card = (Path(done["model"]) / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (layers? [\d-]+|embeddings|norm|head|tokenizer) \| (.*) \|$", card, re.MULTILINE)
    assert rows == [
        ("layers 0-1", "the configuration so far, layers 0-1"),
        ("layers 2-4", "brick deep, layers 3-5"),
        ("layer 5", "brick lora, layer 1"),
        ("layer 6", "brick mix, layer 3"),
        ("layer 7", "the configuration so far, layer 1"),
        ("embeddings", "brick one"),
        ("norm", "brick deep"),
    ]


def test_the_plan_names_the_source_of_each_block(several: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(several.path)
    step = "steps: [{grow: stack, slices: [{layers: [0, 2]}, {brick: deep, layers: [2, 6]}, {layers: [1, 3], merge: linear, bricks: {one: 0.4, mix: 0.6}, ranges: {mix: [2, 4]}}]}]\n"
    several.write(using(step))
    planned = document("plan", "recipes/test.yaml")
    assert planned["steps"][0]["blocks"] == [
        {"layers": "0-1", "source": "the configuration so far", "from": "0-1"},
        {"layers": "2-5", "source": "deep", "from": "2-5"},
        {"layers": "6-7", "merge": "linear", "bricks": {"one": "1-2", "mix": "2-3"}, "base": None, "from": "1-2"},
    ]
    assert planned["steps"][0]["bricks"] == {"deep": "checkpoint", "one": "checkpoint", "mix": "recipe"}
    text = call("plan", "recipes/test.yaml").stdout
    assert "linear of one 1-2, mix 2-3; deltas from the configuration so far 1-2" in re.sub(r"\s+", " ", text)


def test_a_merged_slice_is_the_merge_of_these_layers(several: Project, models: Path) -> None:
    """TIES over layers 1 to 3 is TIES over the whole model there; a linear merge of shifted layers is computed by hand."""
    ties = "merge: ties, bricks: {one: 0.7, two: 1.2}, density: 0.4"
    stacked = several.tensors(using(f"steps: [{{grow: stack, slices: [{{layers: [0, 1]}}, {{layers: [1, 4], {ties}}}]}}]\n"))
    merged = several.tensors(f"bricks: {{one: one, two: two}}\nsteps: [{{{ties}}}]\n")
    for number in (1, 2, 3):
        assert all(torch.equal(t, layer(merged, number)[n]) for n, t in layer(stacked, number).items())
    assert not torch.equal(merged["model.norm.weight"], stacked["model.norm.weight"])
    linear = (
        "{layers: [2, 4], merge: linear, bricks: {one: {first: 0.2, last: 0.6}, deep: 1.0}, ranges: {deep: [4, 6]}, base: one}"
    )
    ours = several.tensors(
        using(f"steps: [{{grow: stack, slices: [{linear}], norm: {{merge: linear, bricks: {{one: 1, deep: 3}}}}}}]\n")
    )
    one, deep = tensors_of(models / "one"), tensors_of(models / "deep")
    for number, weight in ((0, 0.2), (1, 0.6)):
        for name, tensor in layer(ours, number).items():
            expected = (weight * layer(one, 2 + number)[name] + layer(deep, 4 + number)[name]) / (weight + 1)
            assert torch.allclose(tensor, expected, atol=1e-6)
    norm = (one["model.norm.weight"] + 3 * deep["model.norm.weight"]) / 4
    assert torch.allclose(ours["model.norm.weight"], norm, atol=1e-6)


def test_random_masks_follow_the_seed_and_the_range(several: Project, models: Path) -> None:
    """The same seed gives the same masks, another seed others, and two slices of one layer have different ones."""
    part = "{layers: [1, 2], merge: dare, bricks: {one: 1.0}, density: 0.5}"
    shifted = "{layers: [1, 2], merge: dare, bricks: {one: 1.0}, density: 0.5, ranges: {one: [2, 3]}}"
    text = using(f"steps: [{{grow: stack, slices: [{part}, {part}, {shifted}]}}]\n")
    first, again, other = several.tensors(text), several.tensors(text), several.tensors(text + "seed: 1\n")
    name = "mlp.up_proj.weight"
    assert torch.equal(layer(first, 0)[name], layer(again, 0)[name])
    assert torch.equal(layer(first, 0)[name], layer(first, 1)[name])
    assert not torch.equal(layer(first, 0)[name], layer(other, 0)[name])
    base = layer(tensors_of(models / "base"), 1)[name]
    kept, kept_shifted = ((layer(first, n)[name] != base) for n in (0, 2))
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(kept, kept_shifted)


@pytest.mark.parametrize(
    ("fields", "tied"),
    [
        ("", True),
        ("embeddings: one", True),
        ("embeddings: one, head: one", True),
        ("embeddings: one, head: deep", False),
        ("head: one", False),
        ("embeddings: untied, head: untied", True),
        ("head: untied", False),
        ("head: {merge: linear, bricks: {one: 1, untied: 1}}", False),
    ],
)
def test_a_tied_head_follows_the_embeddings_unless_it_has_another_source(
    fields: str, tied: bool, several: Project, models: Path
) -> None:
    text = using(f"steps: [{{grow: stack, slices: [{{layers: [0, 2]}}]{', ' if fields else ''}{fields}}}]\n")
    if fields == "embeddings: untied, head: untied":
        tied = False  # its head is another tensor than its embeddings
    done = several.run(text)
    ours = tensors_of(Path(done["model"]))
    assert ("lm_head.weight" in ours) is not tied
    table = "model.embed_tokens.weight"
    base, one, deep, untied = (tensors_of(models / n) for n in ("base", "one", "deep", "untied"))
    model = live(Path(done["model"]))
    assert model.config.tie_word_embeddings is tied
    head = model.get_output_embeddings().weight
    expected = {
        "": base[table],
        "embeddings: one": one[table],
        "embeddings: one, head: one": one[table],
        "embeddings: one, head: deep": deep[table],
        "head: one": one[table],
        "embeddings: untied, head: untied": untied["lm_head.weight"],
        "head: untied": untied["lm_head.weight"],
    }.get(fields, (one[table] + untied["lm_head.weight"]) / 2)
    assert torch.allclose(head, expected, atol=1e-6)


def test_an_untied_base_takes_the_embeddings_of_a_tied_brick_as_head(several: Project, models: Path) -> None:
    text = "base: untied\nbricks: {one: one}\nsteps: [{grow: stack, slices: [{brick: one}], head: one}]\n"
    ours = several.tensors(text)
    assert torch.equal(ours["lm_head.weight"], tensors_of(models / "one")["model.embed_tokens.weight"])
    assert torch.equal(ours["model.embed_tokens.weight"], tensors_of(models / "untied")["model.embed_tokens.weight"])


def test_tokenizer_and_vocabulary_of_a_source(several: Project, models: Path, tmp_path: Path) -> None:
    """A model with more tokens gives embeddings and tokenizer; config.json states its rows."""
    import shutil

    from safetensors.torch import save_file

    wide = several.path / "wide"
    shutil.copytree(models / "one", wide)
    tensors = tensors_of(models / "one")
    rows = tensors["model.embed_tokens.weight"].shape[0] + 2
    tensors["model.embed_tokens.weight"] = torch.randn(rows, 32)
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    edit_json(wide / "config.json", vocab_size=rows)
    tokens = json.loads((wide / "tokenizer.json").read_text("utf-8"))
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": rows - 2, "content": "<new>"})
    (wide / "tokenizer.json").write_text(json.dumps(tokens), "utf-8")
    step = (
        "steps: [{grow: stack, slices: [{layers: [0, 1]}, {brick: wide, layers: [1, 3]}], embeddings: wide, tokenizer: wide}]\n"
    )
    with pytest.raises(WorkbenchError, match="brick 'wide': its vocabulary differs from the base's") as caught:
        several.resolve("bricks: {wide: wide}\n" + step)
    assert "any_base: true" in str(caught.value.hint)
    kept = "base: base\nbricks: {wide: {checkpoint: wide, any_base: true}}\n" + step
    assert any(w.startswith("brick 'wide': its vocabulary differs from the base's") for w in several.resolve(kept).warnings)
    done = several.run(kept)
    place = Path(done["model"])
    assert live(place).config.vocab_size == rows
    assert (place / "tokenizer.json").read_bytes() == (wide / "tokenizer.json").read_bytes()
    with pytest.raises(WorkbenchError, match=f"the embeddings have {rows} rows and the head has {rows - 2}"):
        compose(several.resolve("base: untied\nbricks: {wide: {checkpoint: wide, any_base: true}}\n" + step), CPU)


def test_later_steps_reach_layers_of_the_base_only(several: Project, models: Path) -> None:
    stack = "{grow: stack, slices: [{layers: [0, 4]}, {brick: deep, layers: [0, 1]}]}"
    ours = several.tensors(using(f"steps: [{stack}, {{merge: task_arithmetic, bricks: [one]}}]\n"))
    one, deep = tensors_of(models / "one"), tensors_of(models / "deep")
    assert all(torch.allclose(t, layer(one, 3)[n], atol=1e-6) for n, t in layer(ours, 3).items())
    assert all(torch.equal(t, layer(deep, 0)[n]) for n, t in layer(ours, 4).items())


def test_keys_follow_sources_and_methods(several: Project) -> None:
    def key(part: str, seed: int = 0) -> str:
        return str(several.resolve(using(f"steps: [{{grow: stack, slices: [{part}]}}]\nseed: {seed}\n")).key)

    assert key("{brick: one}") != key("{brick: deep}")
    assert key("{brick: one}") == key("{brick: one}", seed=1)
    dare = "{layers: [0, 2], merge: dare, bricks: {one: 1.0}, density: %s}"
    assert len({key(dare % 0.5), key(dare % 0.6), key(dare % 0.5, seed=1)}) == 3


def test_a_recorded_step_reads_back(several: Project) -> None:
    """The fields in run.json, and a recipe with overrides, give the same configuration again."""
    from workbench.recipe.recipe import from_data
    from workbench.resolve.resolve import resolve

    text = using("steps: [{grow: stack, slices: [{layers: [0, 2], merge: ties, bricks: {one: 1.0}, lambda: 0.5}], norm: one}]\n")
    resolved = several.resolve(text)
    again = resolve(from_data(resolved.recipe.fields.model_dump(mode="json", by_alias=True), several.path))
    assert again.key == resolved.key


def test_bytes_do_not_depend_on_threads_and_reads_are_bounded(several: Project) -> None:
    text = using(
        "steps: [{grow: stack, slices: [{brick: deep}, {merge: ties, layers: [0, 2], bricks: {one: 1.0, lora: 1.0}}]}]\n"
    )
    first = several.run(text, threads=1)
    digest = first["configuration"]
    import shutil

    shutil.rmtree(several.path / "runs")
    assert several.run(text, threads=3)["configuration"] == digest
    planned = plan(several.resolve(text), several.path / "runs")
    assert planned.peak_bytes < 2_000_000_000


def test_each_source_alone_is_a_control_of_eval(several: Project, models: Path) -> None:
    """A brick of another depth is scored as its own model; bricks without a common delta have no average."""
    from workbench.evaluate.lineup import lineup
    from workbench.models.live import compute
    from workbench.recipe.recipe import load_recipe

    text = using(
        "steps: [{grow: stack, slices: [{layers: [0, 2]}, {brick: deep, layers: [0, 2]}, {brick: lora, layers: [2, 4]}]}]\n"
    )
    entries = {entry.name: entry for entry in lineup([load_recipe(several.write(text))])}
    assert list(entries) == ["base", "deep", "lora", "test"]
    alone = compute(compose(entries["deep"].resolved, CPU).model, torch.float32, CPU)
    expected = tensors_of(models / "deep")
    assert alone.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in alone.items())
    tuned = compute(compose(entries["lora"].resolved, CPU).model, torch.float32, CPU)
    assert all(torch.allclose(tensor, baked(models / "base", models / "lora")[name], atol=1e-6) for name, tensor in tuned.items())


BAD = [
    ("slices: []", "slices: expected at least 1 entries"),
    ("slices: [{brick: gone}]", "slices.0.brick: no brick 'gone' under `bricks`"),
    ("slices: [{layers: [0, 2]}], tokenizer: gone", "tokenizer: no brick 'gone' under `bricks`"),
    ("slices: [{layers: [0, 5]}]", "slice 0: layer 4 does not exist; the configuration so far has layers 0..3"),
    ("slices: [{brick: deep, layers: [5, 7]}]", "slice 0: layer 6 does not exist; brick 'deep' has layers 0..5"),
    ("slices: [{layers: [2, 2]}]", "slices.0.layers: expected 0 <= first < end, found [2, 2]"),
    ("slices: [{layers: [0, 2], base: one}]", "slices.0: `base` belongs to `merge: METHOD`"),
    ("slices: [{layers: [0, 2], ranges: {one: [0, 2]}}]", "slices.0: `ranges` belongs to `merge: METHOD`"),
    ("slices: [{layers: [0, 2], merge: tie, bricks: {one: 1}}]", "slices.0: unknown merge method 'tie'. Did you mean 'ties'"),
    (
        "slices: [{layers: [0, 2], merge: ties, bricks: {one: 1}, densty: 0.2}]",
        "slices.0.densty: unknown field. Did you mean 'density'?",
    ),
    (
        "slices: [{layers: [0, 2], merge: ties, bricks: {one: 1}, density: 2}]",
        "slices.0.density: expected a share between 0 and 1, found 2",
    ),
    ("slices: [{layers: [0, 2], merge: ties}]", "slices.0: list the bricks to merge"),
    ("slices: [{layers: [0, 2], merge: ties, bricks: {gone: 1}}]", "slices.0.bricks.gone: no brick 'gone' under `bricks`"),
    ("slices: [{layers: [0, 2], merge: slerp, bricks: {one: 1.0}}]", "slices.0.bricks: slerp takes exactly 2 bricks, found 1"),
    (
        "slices: [{layers: [0, 2], merge: linear, bricks: {one: 1}, ranges: {one: [0, 3]}}]",
        "the ranges of one merge must have the same length",
    ),
    (
        "slices: [{merge: linear, bricks: {deep: 1}}]",
        "the ranges of one merge must have the same length: the configuration so far has 4 layers, brick 'deep' 6",
    ),
    (
        "slices: [{layers: [0, 2], merge: linear, bricks: {one: 1}, ranges: {deep: [0, 2]}}]",
        "`ranges` names 'deep', which the slice does not merge",
    ),
    (
        "slices: [{layers: [0, 2], merge: regmean, bricks: {one: 1}, calibration: rows.jsonl}]",
        "slices.0.merge: regmean measures on texts or on live models",
    ),
    (
        "slices: [{layers: [0, 2], merge: linear, bricks: {one: 1}, where: {layers: '7'}}]",
        "layers '7' matches no tensor of the slice",
    ),
    (
        "slices: [{brick: one, layers: [0, 2], scale: {'*.k_prj*': 2}}]",
        "the glob '*.k_prj*' of `scale` matches no tensor of layer 0",
    ),
    ("slices: [{brick: narrow}]", "brick 'narrow' has hidden_size 16, the configuration so far 32"),
    ("slices: [{brick: heads}]", "brick 'heads' has num_attention_heads 8, the configuration so far 4"),
    ("slices: [{brick: qwen}]", "brick 'qwen' is a qwen2 model, the configuration so far a llama model"),
    ("slices: [{brick: words}]", "brick 'words': its vocabulary differs from the base's"),
    ("slices: [{layers: [0, 4]}], tokenizer: mute", "brick 'mute' is named for the tokenizer, but"),
]


@pytest.fixture(scope="module")
def misfits(models: Path) -> Path:
    """Models that do not fit: narrow, heads (8 of 4 channels), qwen, words (other tokens), mute (no tokenizer)."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    folder = models
    config = LlamaConfig(**{**json.loads((models / "base" / "config.json").read_text("utf-8")), "hidden_size": 16, "head_dim": 8})
    LlamaForCausalLM(config).save_pretrained(folder / "narrow")
    (folder / "narrow" / "tokenizer.json").write_bytes((models / "base" / "tokenizer.json").read_bytes())
    shutil.copytree(models / "one", folder / "heads")
    edit_json(folder / "heads" / "config.json", num_attention_heads=8, head_dim=None, num_key_value_heads=4)
    save_model(folder / "qwen", "qwen2", dtype=torch.float32)
    shutil.copytree(models / "one", folder / "words")
    tokens = json.loads((folder / "words" / "tokenizer.json").read_text("utf-8"))
    words = list(tokens["model"]["vocab"])
    tokens["model"]["vocab"] |= {words[5]: tokens["model"]["vocab"][words[6]], words[6]: tokens["model"]["vocab"][words[5]]}
    (folder / "words" / "tokenizer.json").write_text(json.dumps(tokens), "utf-8")
    shutil.copytree(models / "one", folder / "mute")
    (folder / "mute" / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_stacks_are_refused_before_any_work(fields: str, message: str, misfits: Path, several: Project) -> None:
    (several.path / "rows.jsonl").write_text('{"text": "w3"}\n', "utf-8")
    with pytest.raises(WorkbenchError) as caught:
        plan(several.resolve(using(f"steps: [{{grow: stack, {fields}}}]\n")), several.path / "runs")
    assert message in caught.value.message
    assert not (several.path / "runs").exists()


def test_config_lists_over_layers_follow_their_sources(several: Project) -> None:
    """Sliding windows of qwen2: the list of each model moves with its layers; a merge of unlike layers is refused."""
    save_model(several.path / "first", "qwen2", dtype=torch.float32)
    save_model(several.path / "second", "qwen2", dtype=torch.float32, seed=1)
    edit_json(several.path / "second" / "config.json", layer_types=["sliding_attention", "full_attention"] * 2)
    head = "base: first\nbricks: {second: second}\n"
    done = several.run(head + "steps: [{grow: stack, slices: [{layers: [1, 3]}, {brick: second, layers: [0, 3]}]}]\n")
    written = json.loads((Path(done["model"]) / "config.json").read_text("utf-8"))
    kinds: Any = json.loads((several.path / "first" / "config.json").read_text("utf-8"))["layer_types"]
    assert written["layer_types"] == [*kinds[1:3], "sliding_attention", "full_attention", "sliding_attention"]
    with pytest.raises(
        WorkbenchError, match="layer 0 of the configuration so far and layer 0 of brick 'second' differ in layer_types"
    ):
        compose(several.resolve(head + "steps: [{grow: stack, slices: [{merge: linear, bricks: {second: 1}}]}]\n"), CPU)

"""Folders as the hub has them: what lies beside the weights, what is missing, what is refused and the command that repairs it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.hub_layouts import Tensors, live_model, save_hub, save_native
from worlds.project import Project
from worlds.tiny import edit_json, save_adapter, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import INDEX, SINGLE
from workbench.run.materialize import materialize

STRAY = "brick 'one': left out, because its own class in transformers does not load it: stray (1 tensor)"
ONE = "bricks: {one: one}\nsteps: [{merge: task_arithmetic}]\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout -> a folder with base/, one/ (a fine-tune), and both again in native/. Not to be changed by a test."""
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in made:
            place = made[layout] = tmp_path_factory.mktemp("hub")
            base = live_model(layout, 0)
            for name, model in {"base": base, "one": live_model(layout, 1, base)}.items():
                save_hub(model, layout, place / name)
                save_native(model, place / "native" / name)
        return made[layout]

    return get


@pytest.fixture
def copy(models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Project]:
    """Layout -> a project with copies that a test may spoil."""

    def get(layout: str = "llama") -> Project:
        shutil.copytree(models(layout), tmp_path, dirs_exist_ok=True)
        (tmp_path / "recipes").mkdir()
        return Project(tmp_path)

    return get


def refused(project: Project, text: str = ONE) -> WorkbenchError:
    with pytest.raises(WorkbenchError) as caught:
        project.resolve(text)
    assert not (project.path / "runs").exists()
    return caught.value


def drop(folder: Path, *parts: str, file: str = SINGLE) -> None:
    """Take out every tensor whose name has one of the parts."""
    tensors = load_file(folder / file)
    save_file({n: t for n, t in tensors.items() if not any(p in n for p in parts)}, folder / file, metadata={"format": "pt"})


def change(folder: Path, edit: Callable[[Tensors], None], file: str = SINGLE) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """One file into two and an index; gives the map."""
    tensors = load_file(folder / SINGLE)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / SINGLE).unlink()
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


# -- what a brick lacks or has too much of


@pytest.mark.parametrize(
    ("layout", "tensor"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
        ("gpt2", "h.1.mlp.c_fc.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
        ("granitemoehybrid", "model.layers.0.mamba.A_log"),
    ],
)
def test_one_tensor_missing_or_one_too_many(layout: str, tensor: str, copy: Callable[[str], Project]) -> None:
    project = copy(layout)
    change(project.path / "one", lambda t: t.update(stray=torch.zeros(2)))
    assert STRAY in project.resolve(ONE).warnings
    change(project.path / "one", lambda t: (t.pop("stray"), t.pop(tensor))[0])
    assert f"brick 'one': lacks {tensor} (" in refused(project).message
    project.write("bricks: {}\nsteps: []\n")
    change(project.path / "base", lambda t: t.pop(tensor))
    with pytest.raises(
        WorkbenchError,
        match=r"no tensor fits .* its values would be random|transformers cannot make .*experts.gate_up_proj from this group",
    ):
        materialize(project.resolve("steps: []\n"), torch.device("cpu"))


def test_one_tensor_missing_in_another_layout(copy: Callable[[str], Project]) -> None:
    """No half of a fused weight is ever taken for the whole."""
    project = copy("mixtral")
    tensor = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    change(project.path / "one", lambda t: t.pop(tensor))
    error = refused(project, "base: native/base\n" + ONE)
    assert "brick 'one': lacks" in error.message
    assert "model.layers.1." in (error.hint or "")
    change(project.path / "native" / "one", lambda t: t.update(stray=torch.zeros(2)))
    assert STRAY in project.resolve(ONE.replace("one: one", "one: native/one")).warnings


@pytest.mark.parametrize(
    ("layout", "modules"),
    [
        ("llama", ["q_proj"]),
        ("gpt2", ["c_attn"]),
        ("gpt_neox", ["query_key_value"]),
        ("mixtral", ["q_proj"]),
        ("phi3", ["gate_up_proj"]),
    ],
)
def test_one_adapter_key_missing_or_one_too_many(layout: str, modules: list[str], copy: Callable[[str], Project]) -> None:
    project = copy(layout)
    adapter = save_adapter(project.path / "base", project.path / "lora", seed=1, target_modules=modules)
    text = "bricks: {one: lora}\nsteps: [{merge: task_arithmetic}]\n"
    merged = project.tensors(text)
    touched = [n for n, t in tensors_of(project.path / "base").items() if n in merged and not torch.equal(merged[n], t.float())]
    assert len(touched) == 2, "one module a layer"
    assert all(modules[0] in name for name in touched)
    key = sorted(load_file(adapter / "adapter_model.safetensors"))[0]
    change(
        adapter,
        lambda t: t.update({key.replace("layers.0", "layers.7").replace("h.0", "h.7"): t[key].clone()}),
        "adapter_model.safetensors",
    )
    assert "brick 'one': " in refused(project, text).message
    assert ".7." in refused(project, text).message
    drop(adapter, ".7.", key, file="adapter_model.safetensors")
    module = key.removeprefix("base_model.model.").partition(".lora_")[0]
    assert f"brick 'one': {module} has lora_B, but no lora_A" in refused(project, text).message


def test_another_architecture(copy: Callable[[str], Project], models: Callable[[str], Path]) -> None:
    project = copy("llama")
    shutil.copytree(models("gpt_neox") / "one", project.path / "other")
    error = refused(project, ONE.replace("one: one", "one: other"))
    assert "The brick is a gpt_neox model, the base a llama model" in (error.hint or "")


def test_untied_brick_of_a_tied_base(copy: Callable[[str], Project]) -> None:
    project = copy("gemma2")
    change(project.path / "one", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert "lm_head.weight differs from model.embed_tokens.weight, although config.json ties them" in refused(project).message
    edit_json(project.path / "one" / "config.json", tie_word_embeddings=False)
    found = project.resolve(ONE)
    assert found.warnings[0].startswith("brick 'one' has a head of its own: the output is untied")
    assert "lm_head.weight" in found.base.weights.specs


# -- what lies beside the weights


def test_what_is_not_read_changes_nothing(copy: Callable[[str], Project]) -> None:
    project = copy("llama")
    before = project.resolve(ONE)
    expected = before.base_digest, before.digests
    shard(project.path / "one")
    for folder in (project.path / "base", project.path / "one"):
        (folder / "original").mkdir()
        for file in (
            "consolidated.safetensors",
            "original/consolidated.00.pth",
            "pytorch_model.bin",
            "model-00003-of-00003.safetensors",
        ):
            (folder / file).write_bytes(b"not read")
        for file in ("tokenizer.model", "training_args.bin", "optimizer.pt", ".gitattributes", "params.json"):
            (folder / file).write_bytes(b"not read")
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00009.bin"}}')
    found = project.resolve(ONE)
    assert (found.base_digest, found.digests) == expected
    document = project.run(ONE)
    assert (Path(document["model"]) / "tokenizer.model").read_bytes() == b"not read", "the base's tokenizer goes with the result"
    assert "apache-2.0" in (Path(document["model"]) / "README.md").read_text()


def test_file_and_index_side_by_side(copy: Callable[[str], Project]) -> None:
    """transformers reads the single file; so do we, unless the index is of another model."""
    project = copy("llama")
    expected = project.resolve(ONE).digests
    whole = (project.path / "one" / SINGLE).read_bytes()
    where = shard(project.path / "one")
    (project.path / "one" / SINGLE).write_bytes(whole)
    for file in set(where.values()):
        (project.path / "one" / file).write_bytes(b"stale")
    assert project.resolve(ONE).digests == expected
    write_index(project.path / "one", {**where, "extra": "model-00001-of-00002.safetensors"})
    error = refused(project)
    assert "are of different models: only one of them has extra" in error.message
    assert error.hint == "Remove the outdated one."


def test_adapter_and_checkpoint_in_one_folder(copy: Callable[[str], Project]) -> None:
    project = copy("llama")
    adapter = save_adapter(project.path / "base", project.path / "lora", seed=1)
    shutil.copy(project.path / "base" / "config.json", adapter)  # as some trainers leave it
    assert project.resolve(ONE.replace("one: one", "one: lora")).bricks["one"].kind == "adapter"
    assert (
        "is an adapter, but the recipe says checkpoint"
        in refused(project, ONE.replace("one: one", "one: {checkpoint: lora}")).message
    )
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, project.path / "one")
    error = refused(project)
    assert "one holds both an adapter (adapter_config.json) and a checkpoint" in error.message
    assert "`one: {adapter: one}` or `one: {checkpoint: one}`" in (error.hint or "")
    for kind in ("adapter", "checkpoint"):
        assert project.resolve(ONE.replace("one: one", f"one: {{{kind}: one}}")).bricks["one"].kind == kind
    assert project.resolve("base: one\nsteps: []\n").base.weights.specs, "a base is the checkpoint"


def test_damaged_shards(copy: Callable[[str], Project]) -> None:
    project = copy("llama")
    one = project.path / "one"
    where = shard(one)
    first = one / "model-00001-of-00002.safetensors"
    write_index(one, {**where, "lost.weight": first.name})
    assert "names lost.weight, which no file has" in refused(project).message
    write_index(one, {**where, "far.weight": "../base/model.safetensors"})
    assert "names a file outside its directory ('../base/model.safetensors')" in refused(project).message
    write_index(one, where)
    change(one, lambda t: t.update(stray=torch.zeros(2)), first.name)
    assert STRAY in project.resolve(ONE).warnings, "a tensor that the index does not name is still there"
    first.write_bytes(first.read_bytes()[:-7])
    assert "(truncated?)" in refused(project).message
    first.unlink()
    assert f"names {first.name}, which is missing" in refused(project).message
    (one / INDEX).unlink()
    error = refused(project)
    assert "no model.safetensors in" in error.message
    assert "(found model-00002-of-00002.safetensors)" in error.message


# -- other formats


def converted(hint: str | None, folder: Path) -> Tensors:
    """Run the command that a hint prints, here; gives the tensors that it wrote."""
    command = shlex.split((hint or "")[(hint or "").index("python -c") :])
    exec(command[2], {})
    return tensors_of(folder.with_name(f"{folder.name}-safetensors"))


@pytest.mark.parametrize("what", ["base", "one"])
def test_pickles(what: str, copy: Callable[[str], Project]) -> None:
    project = copy("llama")
    folder = project.path / what
    tensors = {n: t.bfloat16() for n, t in load_file(folder / SINGLE).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    error = refused(project)
    assert "has pickle files only (pytorch_model.bin), which are never opened; expected model.safetensors" in error.message
    again = converted(error.hint, folder)
    assert all(torch.equal(again[n], t) for n, t in tensors.items())


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("bitsandbytes", r"that can run bitsandbytes: python -c .*\.dequantize\(\)\.save_pretrained"),
        ("mxfp4", r"Mxfp4Config\(dequantize=True\)"),
        ("compressed-tensors", r"CompressedTensorsConfig\(dequantize=True\)"),
        ("gptq", r"Use the model that it was quantized from"),
        ("awq", r"Use the model that it was quantized from"),
    ],
)
@pytest.mark.parametrize("what", ["base", "one"])
def test_quantised_by_config(method: str, hint: str, what: str, copy: Callable[[str], Project]) -> None:
    import re

    project = copy("llama")
    edit_json(project.path / what / "config.json", quantization_config={"quant_method": method})
    error = refused(project)
    assert f"{'base' if what == 'base' else 'brick'}" in error.message
    assert f"quantized weights ({method}); expected floating point" in error.message
    assert re.search(hint, error.hint or "")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.qweight",
        "model.layers.0.mlp.experts.gate_up_proj_blocks",
        "model.layers.0.mlp.up_proj.weight.absmax",
    ],
)
def test_packed_weights_without_a_word(name: str, copy: Callable[[str], Project]) -> None:
    project = copy("llama")
    change(project.path / "one", lambda t: t.update({name: torch.zeros(4, 4, dtype=torch.uint8)}))
    assert f"brick 'one': {name} is part of a quantized weight" in refused(project).message


@pytest.mark.parametrize("what", ["base", "one"])
def test_gguf(what: str, copy: Callable[[str], Project]) -> None:
    project = copy("llama")
    folder = project.path / what
    tensors = load_file(folder / SINGLE)
    for file in [*folder.iterdir()]:
        file.unlink()  # a repository of GGUF files has no config.json
    write_gguf(folder / "tiny-f32.gguf", tensors)
    whole = project.resolve(f"base: {what}\nsteps: []\n")
    by_name = project.resolve(f"base: {what}/tiny-f32.gguf\nsteps: []\n")
    assert whole.base_digest == by_name.base_digest
    read = project.tensors(f"base: {what}\nsteps: []\n")
    assert set(read) == set(tensors)
    assert all(torch.equal(read[n], t) for n, t in tensors.items())


def write_gguf(file: Path, tensors: Tensors) -> None:
    """The tiny llama as GGUF in float32. llama.cpp pairs rotary dimensions differently, hence the order of rows."""
    writer: Any = gguf.GGUFWriter(str(file), "llama")
    for add, value in {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48, "head_count": 4,
                       "head_count_kv": 2, "layer_norm_rms_eps": 1e-6, "rope_dimension_count": 8, "vocab_size": 64}.items():  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}  # fmt: skip
    for name, tensor in tensors.items():
        for part, short in parts.items():
            if part in name and not (part == "model.norm" and "layers" in name):
                layer = name.split(".")[2] if "layers" in name else None
                heads = {"attn_q": 4, "attn_k": 2}.get(short)
                rows = tensor.view(heads, 2, -1, 32).swapaxes(1, 2).reshape(tensor.shape) if heads else tensor
                writer.add_tensor(f"blk.{layer}.{short}.weight" if layer else f"{short}.weight", rows.contiguous().numpy())
    for finish in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{finish}")()
    writer.close()


def test_digests_do_not_count_buffers(copy: Callable[[str], Project], models: Callable[[str], Path]) -> None:
    """An old file and the same model saved anew are one base."""
    project = copy("gpt_neox")
    new = project.resolve("steps: []\n").base_digest
    assert len(project.resolve("steps: []\n").warnings) == 1
    drop(project.path / "base", "inv_freq", "attention.bias", "masked")
    resolved = project.resolve("steps: []\n")
    assert resolved.base_digest == new
    assert resolved.warnings == ()

"""GGUF files as models: equal to the models that they were written from and to what transformers reads, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from worlds.packed_models import save_gguf
from worlds.project import Project
from worlds.tiny import VOCABULARY, randomize_vectors, save_finetuned, save_tokenizer, tensors_of

from workbench.bricks.gguf_files import _divisor
from workbench.bricks.locate import resolve_base
from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import load_tokenizer
from workbench.weights.packed import LINK, RECORD
from workbench.weights.specs import load

WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
}
FAMILIES = list(CLASSES)


def save_family(out: Path, family: str, **changes: Any) -> Path:
    """A random float32 model with a tokenizer; norms and biases are random too."""
    import transformers

    name, own = CLASSES[family]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**WIDE, **own, **changes})).float()
    randomize_vectors(model)
    model.save_pretrained(out)
    save_tokenizer(out)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a model directory, not to be changed."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_family(tmp_path_factory.mktemp("families") / family, family)
        return made[family]

    return get


def read(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a GGUF file as a base, in float32."""
    checkpoint, _ = resolve_base(str(file), file.parent)
    return {name: load(checkpoint, name, torch.float32) for name in checkpoint.specs}


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """Norms of Gemma are stored plus 1, which rounds them; everything else is equal bit for bit."""
    file = save_gguf(models(family), tmp_path / "model.gguf", family)
    found, want = read(file), tensors_of(models(family))
    assert set(found) == set(want)
    for name, tensor in want.items():
        shifted = family.startswith("gemma") and name.endswith("norm.weight")
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1.2e-7 if shifted else 0)
    checkpoint, _ = resolve_base(str(file), file.parent)
    for name in (name for name in want if "layers.1." in name and name.endswith(("q_proj.weight", "k_proj.weight"))):
        for start, stop in ((0, 1), (5, 11), (9, len(found[name]))):  # rows of parts of heads
            out = torch.empty(stop - start, found[name].shape[1])
            checkpoint.open(name, torch.device("cpu")).read(start, stop, out)
            assert torch.equal(out, found[name][start:stop])


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "qwen3"]
)  # transformers takes 128 for its head_dim
def test_equals_transformers(family: str, kind: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    file = save_gguf(models(family), tmp_path / "model.gguf", family, kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    for name, tensor in read(file).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_blocks_of_32(kind: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """Equal to the package's own values of the rows as they were before they were interleaved."""
    kinds = gguf.GGMLQuantizationType[kind]
    found = read(save_gguf(models("llama"), tmp_path / "model.gguf", "llama", kind))
    for name, tensor in tensors_of(models("llama")).items():
        if tensor.dim() > 1:
            want = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kinds), kinds)
            assert torch.equal(found[name], torch.from_numpy(want)), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_256(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random blocks, because the package only reads these kinds; equal to what the package reads."""
    base = save_family(tmp_path / "base", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    stored: dict[int, np.ndarray[Any, Any]] = {}
    generator = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType[kind]
    exact = gguf.quants.quantize

    def random_blocks(values: np.ndarray[Any, Any], to: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
        if to != kinds:
            return exact(values, to)
        size, width = gguf.GGML_QUANT_SIZES[kinds]
        # bytes below 64: a half of such bytes is a finite number
        blocks = generator.integers(0, 60, (len(values), values.shape[1] // size * width), dtype=np.uint8)
        stored[len(stored)] = blocks
        return blocks

    monkeypatch.setattr(gguf.quants, "quantize", random_blocks)
    file = save_gguf(base, tmp_path / "model.gguf", "llama", kind)
    found = read(file)
    matrices = [name for name, tensor in tensors_of(base).items() if tensor.dim() > 1]
    for place, name in enumerate(matrices):
        if "q_proj" in name or "k_proj" in name:
            continue  # their rows move, as `test_blocks_of_32` shows
        assert torch.equal(found[name], torch.from_numpy(gguf.quants.dequantize(stored[place], kinds))), name
    notes = resolve_base(str(file), tmp_path)[0].notes
    assert f"{kind} (8)" in notes[0] or f"{kind} (9)" in notes[0]


def test_notes_and_configuration(models: Callable[[str], Path], tmp_path: Path) -> None:
    assert not resolve_base(str(save_gguf(models("llama"), tmp_path / "a.gguf", "llama")), tmp_path)[0].notes
    (note,) = resolve_base(str(save_gguf(models("llama"), tmp_path / "b.gguf", "llama", "Q8_0")), tmp_path)[0].notes
    assert note.startswith(
        "b.gguf stores its tensors as Q8_0 (16), F32 (5). They are read as bfloat16. Quantization to 8.7 bits a value"
    )
    assert "in Q8_0 by up to 0.5 % of the largest value in a block of 32" in note
    file = save_gguf(models("gemma2"), tmp_path / "model.gguf", "gemma2")
    checkpoint, _ = resolve_base(str(file), tmp_path)
    want = json.loads((models("gemma2") / "config.json").read_text("utf-8"))
    same = ("model_type", "head_dim", "sliding_window", "query_pre_attn_scalar", "hidden_size", "architectures", "rms_norm_eps")
    for name in same:
        assert (
            checkpoint.config[name] == pytest.approx(want[name])
            if name == "rms_norm_eps"
            else checkpoint.config[name] == want[name]
        )


@pytest.mark.parametrize(
    ("kind", "of", "bound"),
    [
        ("Q8_0", "largest", 0.005),
        ("Q4_0", "largest", 0.126),
        ("Q4_1", "range", 0.034),
        ("Q5_0", "largest", 0.063),
        ("Q5_1", "range", 0.017),
    ],
)
def test_bounds(kind: str, of: str, bound: float) -> None:
    """The stated bounds hold for random values, and are not far above what happens."""
    values = np.random.default_rng(1).normal(size=(4096, 32)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType[kind]
    error = np.abs(gguf.quants.dequantize(gguf.quants.quantize(values, kinds), kinds) - values).max(1)
    scale = np.abs(values).max(1) if of == "largest" else np.ptp(values, axis=1)
    assert 0.8 * bound < (error / scale).max() <= bound


def test_tokenizer(models: Callable[[str], Path], tmp_path: Path) -> None:
    """It is the one that transformers reads from the file."""
    file = save_gguf(models("qwen2"), tmp_path / "model.gguf", "qwen2")
    ours = load_tokenizer(resolve_base(str(file), tmp_path)[0].path)
    theirs = load_tokenizer(tmp_path, gguf_file=file.name)
    for text in ("the in of", "an order, 12 to 13?", "<eos>"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.convert_ids_to_tokens(ours("the in")["input_ids"]) == ["th", "e", "Ġ", "in"]
    assert ours.eos_token == "<eos>"


def test_a_merge_equals_that_of_safetensors(models: Callable[[str], Path], tmp_path: Path) -> None:
    """A GGUF base with a GGUF brick, by file and by directory, gives the tensors of the same recipe on safetensors."""
    project = Project(tmp_path)
    (tmp_path / "recipes").mkdir()
    shutil.copytree(models("llama"), tmp_path / "base")
    save_finetuned(tmp_path / "base", tmp_path / "one", seed=1)
    save_gguf(tmp_path / "base", tmp_path / "base.gguf", "llama")
    (tmp_path / "one-gguf").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "one")
    save_gguf(tmp_path / "one", tmp_path / "one-gguf" / "any.gguf", "llama")
    steps = "steps: [{merge: ties, density: 0.5}]\n"
    plain = project.tensors(f"base: base\nbricks: {{one: one}}\n{steps}")
    packed = project.tensors(f"base: base.gguf\nbricks: {{one: one-gguf}}\n{steps}")
    assert all(torch.equal(packed[name], tensor) for name, tensor in plain.items())
    done = project.run(f"base: base.gguf\nbricks: {{one: one-gguf}}\n{steps}")
    assert all(torch.equal(tensors_of(Path(done["model"]))[name], tensor) for name, tensor in plain.items())
    assert not (Path(done["model"]) / "gguf.json").exists()
    assert (Path(done["model"]) / "tokenizer.json").is_file()


def refused(file: Path) -> WorkbenchError:
    with pytest.raises(WorkbenchError) as caught:
        resolve_base(str(file), file.parent if file.is_file() else file.parent.parent)
    return caught.value


def test_a_changed_file_is_read_again(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = save_gguf(models("llama"), tmp_path / "model.gguf", "llama")
    before, _ = resolve_base(str(file), tmp_path)
    save_gguf(models("llama"), file, "llama", "F16")
    with pytest.raises(WorkbenchError, match=r"has changed|changed while"):
        resolve_base(str(before.path), tmp_path)
    after, _ = resolve_base(str(file), tmp_path)
    assert {spec.stored for spec in after.specs.values()} == {"F16"}
    shutil.copy(after.path / "tokenizer.json", tmp_path)  # transformers may read it instead of the one in the file
    assert resolve_base(str(file), tmp_path)[0].path != after.path


@pytest.mark.parametrize("lost", [RECORD, LINK, "config.json", "tokenizer.json"])
def test_a_damaged_directory_is_made_again(models: Callable[[str], Path], tmp_path: Path, lost: str) -> None:
    file = save_gguf(models("llama"), tmp_path / "model.gguf", "llama")
    place = resolve_base(str(file), tmp_path)[0].path
    (place / lost).unlink()
    again = resolve_base(str(file), tmp_path)[0]
    assert again.path == place
    assert (place / lost).exists()
    assert set(again.specs)


def test_unknown_fields_and_tensors(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Fields that would change the model's function without an error are refused, with the command that dequantizes the file."""
    error = refused(save_gguf(models("qwen2"), tmp_path / "a.gguf", "qwen2", extra={"rope.scaling.type": "yarn"}))
    assert "the field qwen2.rope.scaling.type = yarn is not read from GGUF files" in error.message
    assert "gguf_file='a.gguf'" in (error.hint or "")
    assert refused(save_gguf(models("qwen2"), tmp_path / "b.gguf", "qwen2", extra={"logit_scale": 2.0}))
    qwen = save_gguf(models("qwen2"), tmp_path / "c.gguf", "qwen3")  # biases and no norms of queries and keys
    assert "c.gguf: the file lacks model.layers.0.self_attn.q_norm.weight" in refused(qwen).message
    assert (
        "the architecture 'phi3' is not read from GGUF files, only llama, qwen2"
        in refused(_header(tmp_path / "d.gguf", "phi3")).message
    )


def _header(file: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_damaged_files(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = save_gguf(models("llama"), tmp_path / "model.gguf", "llama")
    data = file.read_bytes()
    for size in (0, 3, 40, 700, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        assert "not a complete GGUF file" in refused(file).message, size
    file.write_bytes(b"<!DOCTYPE html>" * 99)
    assert "not a complete GGUF file" in refused(file).message
    split = tmp_path / "model-00001-of-00002.gguf"
    split.write_bytes(data)
    assert "is one part of a split file" in refused(split).message


def test_several_files_in_a_directory(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "quants"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        save_gguf(models("llama"), folder / name, "llama")
    error = refused(folder)
    assert f"{folder} has 2 GGUF files (a.gguf, b.gguf)" in error.message
    assert error.hint == f"Name one of them, such as {folder / 'a.gguf'}."
    with pytest.raises(WorkbenchError, match=r"base: no such file: quants/c.gguf") as caught:
        resolve_base("quants/c.gguf", tmp_path)
    assert "a.gguf" in (caught.value.hint or "")
    (folder / "b.gguf").unlink()
    assert resolve_base(str(folder), tmp_path)[0].specs


def test_non_finite(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = save_gguf(models("llama"), tmp_path / "model.gguf", "llama", "Q8_0")
    reader = gguf.GGUFReader(file)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    start = int(tensor.data_offset)
    data = bytearray(file.read_bytes())
    data[start + 34 * 3 : start + 34 * 3 + 2] = np.float16("nan").tobytes()  # the scale of the fourth row, which is one block
    file.write_bytes(data)
    with pytest.raises(WorkbenchError, match=r"base: model.layers.0.mlp.up_proj.weight holds nan at \[3, 0\]"):
        read(file)


def test_rotary_scaling_of_llama_3(models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored factors become the settings that give them in transformers; other factors are refused."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    base = save_family(tmp_path / "base", "llama", hidden_size=128, rope_parameters=rope)
    config = LlamaConfig.from_pretrained(base)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double()
    plain = 500000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    factors = (plain / scaled).float().numpy()
    assert factors[-1] == pytest.approx(32.0)
    assert factors[0] == pytest.approx(1.0)
    assert factors.tolist() == pytest.approx([_divisor(1 / value, 32.0) for value in plain.tolist()], rel=1e-5)
    written = gguf.GGUFWriter.write_header_to_file

    def with_factors(self: Any, *args: Any) -> None:
        self.add_tensor("rope_freqs.weight", factors)
        written(self, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
    found = resolve_base(str(save_gguf(base, tmp_path / "a.gguf", "llama")), tmp_path)[0].config["rope_parameters"]
    assert found == pytest.approx(rope) if "rope_type" not in found else {**found, "factor": pytest.approx(32.0)} == rope
    factors[3] *= 1.1
    assert (
        "rope_freqs.weight does not hold the rotary scaling of Llama 3"
        in refused(save_gguf(base, tmp_path / "b.gguf", "llama")).message
    )

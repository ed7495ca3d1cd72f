"""Weights of 8 bits with scales: what they are worth, what is said about them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.packed_models import BLOCK, blockwise, save_fp8
from worlds.project import CPU
from worlds.tiny import edit_json, save_model

import workbench.weights.specs as specs_module
from workbench.bricks.brick import checkpoint_digest
from workbench.bricks.locate import resolve_base
from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import SINGLE
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import load

LAYOUTS = ("block", "exponents", "channel", "tensor", "plain", "e5m2")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "llama", layers=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(layout: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is worth its stored numbers times their scales, exactly, however many rows are read at once."""
    worth = save_fp8(model, layout)
    checkpoint, _ = resolve_base(str(model), tmp_path)
    assert set(checkpoint.specs) == set(worth)
    assert {spec.stored for spec in checkpoint.specs.values()} == {"BF16"}
    assert "quantization_config" not in checkpoint.config
    for elements in (specs_module.BLOCK_ELEMENTS, 40):
        monkeypatch.setattr(specs_module, "BLOCK_ELEMENTS", elements)
        for name, values in worth.items():
            assert torch.equal(load(checkpoint, name, torch.float32), values), name
            assert torch.equal(load(checkpoint, name, torch.bfloat16), values.bfloat16()), name


def test_notes_and_their_bound(model: Path, tmp_path: Path) -> None:
    before = load_file(model / SINGLE)[UP].float()
    save_fp8(model, "tensor")
    first, second = resolve_base(str(model), tmp_path)[0].notes
    assert first.startswith(
        "14 weights were stored in 8 bits (F8_E4M3 with one scale for a tensor). Rounding changed each value by up to 6.25 %"
    )
    assert first.endswith("They are read as bfloat16.")
    assert second.startswith("drops 14 scales of activations (model.layers.0.mlp.down_proj.input_scale, …)")
    # The stated 6.25 % is the largest error, except of values near zero.
    after = load(resolve_base(str(model), tmp_path)[0], UP, torch.float32)
    far = before.abs() > before.abs().max() / 448 * 2**-6
    error = ((after - before).abs() / before.abs())[far].max().item()
    assert 0.05 < error <= 0.0625


def test_equals_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    stored = load_file(model / SINGLE)
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        stored[name], stored[f"{name}_scale_inv"] = blockwise(stored[name], (16, 16), torch.float8_e4m3fn)
    save_file(stored, model / SINGLE, metadata={"format": "pt"})
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).state_dict()
    checkpoint, _ = resolve_base(str(model), tmp_path)
    for name in checkpoint.specs:
        assert torch.equal(load(checkpoint, name, torch.bfloat16), theirs[name]), name


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 1), (3, 1, 6), (3, 4, 1), (3, 2, 3)])
def test_scales_of_experts(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Scales of tensors [experts, rows, columns]: one, one an expert, a column, a row, or a block of 2 × 2."""
    codes = torch.randn(3, 4, 6).to(torch.float8_e4m3fn)
    scales = torch.rand(shape) + 0.5
    save_file({"experts.up_proj": codes, "experts.up_proj_scale_inv": scales}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}", "utf-8")
    full = scales
    if shape == (3, 2, 3):
        full = scales.repeat_interleave(2, 1).repeat_interleave(2, 2)
    elif shape == (3,):
        full = scales.view(3, 1, 1)
    assert torch.equal(load(Checkpoint(tmp_path, "base"), "experts.up_proj", torch.float32), codes.float() * full)


def test_digest_counts_scales(model: Path, tmp_path: Path) -> None:
    """Equal stored numbers with another scale, or other blocks, are another model, also where digests are cached."""
    save_fp8(model, "block")
    digests = [checkpoint_digest(resolve_base(str(model), tmp_path)[0], tmp_path / "cache") for _ in range(2)]
    scale = load_file(model / SINGLE)[f"{UP}_scale_inv"]
    stored = {**load_file(model / SINGLE), f"{UP}_scale_inv": scale * 2}
    save_file(stored, model / SINGLE, metadata={"format": "pt"})
    digests.append(checkpoint_digest(resolve_base(str(model), tmp_path)[0], tmp_path / "cache"))
    # 32 and 48 columns are two blocks, of 24 columns or of 30
    quantization = {"quant_method": "fp8", "weight_block_size": [BLOCK[0], 30]}
    edit_json(model / "config.json", quantization_config=quantization)
    digests.append(checkpoint_digest(resolve_base(str(model), tmp_path)[0], tmp_path / "cache"))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def refused(model: Path) -> WorkbenchError:
    with pytest.raises(WorkbenchError) as caught:
        resolve_base(str(model), model.parent)
    return caught.value


def test_scales_that_are_missing_or_do_not_fit(model: Path) -> None:
    save_fp8(model, "block")
    stored = load_file(model / SINGLE)
    del stored[f"{UP}_scale_inv"]
    save_file(stored, model / SINGLE)
    assert f"base: {UP} holds 8-bit floats, but {model} has no {UP}_scale_inv" in refused(model).message
    edit_json(model / "config.json", quantization_config=None)
    assert "has no" in refused(model).message, "the other weights have scales"
    save_fp8(model, "block")
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    error = refused(model)
    assert "with weight_block_size [8, 8] in config.json" in error.message
    edit_json(model / "config.json", quantization_config=None)
    stored = load_file(model / SINGLE)
    stored = {name: tensor[:5] if name == f"{UP}_scale_inv" else tensor for name, tensor in stored.items()}
    stored[f"{UP}_scale_inv"] = torch.ones(5, 2)
    save_file(stored, model / SINGLE)
    assert f"{UP}_scale_inv is [5, 2], which does not fit {UP} [48, 32] with no weight_block_size" in refused(model).message


@pytest.mark.parametrize("what", ["weight", "scale"])
def test_non_finite(what: str, model: Path, tmp_path: Path) -> None:
    save_fp8(model, "channel")
    stored = load_file(model / SINGLE)
    if what == "weight":
        stored[UP].view(torch.uint8)[3, 5] = 0x7F
    else:
        stored[f"{UP}_scale"][7] = float("inf")
    save_file(stored, model / SINGLE)
    checkpoint, _ = resolve_base(str(model), tmp_path)
    with pytest.raises(WorkbenchError, match=r"holds nan at \[3, 5\]" if what == "weight" else "a scale is not a finite number"):
        load(checkpoint, UP, torch.float32)


@pytest.mark.parametrize(
    ("name", "codes", "message"),
    [
        (UP, torch.ones(48, 32, dtype=torch.int8), "holds int8 numbers, which are codes of a quantized weight"),
        (UP, torch.ones(48, 4, dtype=torch.int32), "holds int32 numbers, which are codes of a quantized weight"),
        ("model.layers.1.mlp.up_proj.packed", torch.ones(48, 16, dtype=torch.uint8), "holds uint8 numbers, which are codes"),
        (f"{UP}_scale", torch.ones(48, 1), "is part of a quantized weight"),
        (f"{UP}._data", torch.ones(48, 32, dtype=torch.int8), "is part of a quantized weight"),
    ],
)
def test_codes_without_a_word(name: str, codes: torch.Tensor, message: str, model: Path) -> None:
    """A quantization that config.json does not mention is not read as numbers."""
    stored = {**load_file(model / SINGLE), name: codes}
    save_file(stored, model / SINGLE)
    assert f"base: {name} {message}" in refused(model).message


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_other_quantizations(quantization: dict[str, str], method: str, model: Path) -> None:
    edit_json(model / "config.json", quantization_config=quantization)
    error = refused(model)
    assert f"base: quantized weights ({method}); expected floating point" in error.message
    assert error.hint


def test_opens_on_a_device(model: Path, tmp_path: Path) -> None:
    """A block is computed on the CPU and copied to where it is asked for."""
    worth = save_fp8(model, "block")
    source = resolve_base(str(model), tmp_path)[0].open(UP, CPU)
    out = torch.empty(2, 32)
    source.read(17, 19, out)
    assert torch.equal(out, worth[UP][17:19])

"""Weights of 4 and 8 bits, quantized by the library of each format: what is read equals what that library computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worlds.quantized_models import quantize, save_gpt_oss
from worlds.tiny import save_model

from workbench.bricks.locate import resolve_base
from workbench.ground.foreign_names import SINGLE
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import load

SHAPES = [(48, 32), (12, 96), (64, 272)]


def stored(folder: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> Checkpoint:
    """Write one weight with its companions as a checkpoint."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}), "utf-8")
    return Checkpoint(folder, "base")


def test_mxfp4(tmp_path: Path) -> None:
    """Bit for bit what transformers computes, over all exponents whose numbers bfloat16 can hold."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 48, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 253, (2, 48, 3), generator=generator, dtype=torch.uint8)
    checkpoint = stored(tmp_path, {"experts.up_proj_blocks": blocks, "experts.up_proj_scales": scales}, {"quant_method": "mxfp4"})
    theirs = convert_moe_packed_tensors(blocks, scales)
    found = load(checkpoint, "experts.up_proj", torch.bfloat16)
    assert found.shape == theirs.shape == (2, 96, 48)
    assert torch.equal(found.view(torch.int16), theirs.view(torch.int16))


def test_mxfp4_model_equals_transformers(tmp_path: Path) -> None:
    """A whole gpt-oss: every tensor that transformers has after loading it dequantized."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = save_gpt_oss(tmp_path / "model")
    quantize(model, "mxfp4")
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    checkpoint, _ = resolve_base(str(model), tmp_path)
    assert {*checkpoint.specs} == {*theirs}
    for name in checkpoint.specs:
        assert torch.equal(load(checkpoint, name, torch.bfloat16), theirs[name]), name


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_of_4_bits(kind: str, double: bool, tmp_path: Path) -> None:
    """Where rows are no whole blocks, bitsandbytes 0.50 on CPUs with AVX-512 takes wrong scales: the bound of rounding is tested there."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    bound = 0.152 if kind == "nf4" else 0.1667
    for shape in [*SHAPES, (48, 64), (3, 640), (7, 9)]:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
        codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
        tensors = {"up.weight": codes, **{f"up.weight.{key}": part for key, part in state.as_dict(packed=True).items()}}
        checkpoint = stored(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
        found = load(checkpoint, "up.weight", torch.float32)
        if shape[1] % 64 == 0 or shape[1] % 2:
            assert torch.equal(found, bnb.dequantize_4bit(codes, state)), shape
        blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
        largest = blocks.repeat_interleave(64)[: weight.numel()].view(shape)
        assert ((found - weight).abs() <= (bound + 0.06 * double) * largest).all(), shape


def test_bitsandbytes_of_8_bits(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    codes, scales, _ = bnb.int8_vectorwise_quant(torch.randn(48, 32).half())
    tensors = {"up.weight": codes, "up.SCB": scales, "up.weight_format": torch.tensor(0, dtype=torch.uint8)}
    checkpoint = stored(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert torch.equal(load(checkpoint, "up.weight", torch.float32), bnb.int8_vectorwise_dequant(codes, scales))


@pytest.mark.parametrize(
    ("bits", "strategy", "symmetric"),
    [
        (4, "group", True),
        (4, "group", False),
        (4, "channel", False),
        (4, "tensor", True),
        (8, "channel", True),
        (8, "group", False),
        (2, "group", True),
    ],
)
def test_compressed_tensors_of_integers(bits: int, strategy: str, symmetric: bool, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor

    size = 16 if strategy == "group" else None
    args = quantization.QuantizationArgs(num_bits=bits, type="int", strategy=strategy, symmetric=symmetric, group_size=size)
    scheme, config = quantization.QuantizationScheme(targets=["Linear"], weights=args), {"quant_method": "compressed-tensors"}
    for rows, cols in SHAPES:
        generator = torch.Generator().manual_seed(2)
        count = cols // 16 if size else 1
        many = (1,) if strategy == "tensor" else (rows, count)
        weight = (torch.randn(rows, cols, generator=generator) * 0.05).bfloat16()
        tensors = {"weight": weight, "weight_scale": (torch.rand(many, generator=generator) * 0.02 + 0.005).bfloat16()}
        if not symmetric:
            tensors["weight_zero_point"] = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), many, generator=generator).to(
                torch.int8
            )
        packed = packing.compress(tensors, scheme)
        theirs = packing.decompress(packed, scheme)["weight"]
        named = {f"up.{name}": tensor for name, tensor in packed.items()}
        group = {"weights": json.loads(args.model_dump_json())}
        checkpoint = stored(tmp_path, named, {**config, "format": "pack-quantized", "config_groups": {"group_0": group}})
        assert torch.equal(load(checkpoint, "up.weight", torch.bfloat16), theirs)


def test_compressed_tensors_nvfp4(tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    packing = pytest.importorskip("compressed_tensors.compressors.nvfp4.base").NVFP4PackedCompressor

    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", symmetric=True, group_size=16)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    for rows, cols in SHAPES:
        weight = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(3)) * 0.05).bfloat16()
        whole = (448 * 6 / weight.abs().max().float()).view(1)
        scales = (weight.float().view(rows, -1, 16).abs().amax(-1) * whole / 6).to(torch.float8_e4m3fn)
        tensors = {"weight": weight, "weight_scale": scales.float(), "weight_global_scale": whole}
        packed = packing.compress(tensors, scheme)
        packed["weight_scale"] = packed["weight_scale"].to(torch.float8_e4m3fn)
        theirs = packing.decompress(packed, scheme)["weight"]
        named = {f"up.{name}": tensor for name, tensor in packed.items()}
        checkpoint = stored(tmp_path, named, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})
        assert torch.equal(load(checkpoint, "up.weight", torch.bfloat16), theirs)


def test_awq(tmp_path: Path) -> None:
    awq = pytest.importorskip("awq.utils.packing_utils", exc_type=ImportError)
    base = save_model(tmp_path / "model", "llama", layers=1)
    quantize(base, "awq")
    tensors, (checkpoint, _) = load_file(base / SINGLE), resolve_base(str(base), tmp_path)
    for name in (name for name in checkpoint.specs if name.endswith("_proj.weight")):
        codes, zeros, scales = (tensors[f"{name.removesuffix('weight')}{part}"] for part in ("qweight", "qzeros", "scales"))
        theirs = awq.dequantize_gemm(codes, zeros, scales.float(), 4, 8).T
        assert torch.equal(load(checkpoint, name, torch.float32), theirs), name


@pytest.mark.parametrize("layout", ["gptq", "gptq-order"])
def test_gptq(layout: str, tmp_path: Path) -> None:
    """GPTQModel reads the second version; it converts the first one to it."""
    quantized = pytest.importorskip("gptqmodel.nn_modules.qlinear", exc_type=ImportError)
    base = save_model(tmp_path / "model", "llama", layers=1)
    quantize(base, layout)
    tensors, (checkpoint, _) = load_file(base / SINGLE), resolve_base(str(base), tmp_path)
    for name in (name for name in checkpoint.specs if name.endswith("_proj.weight")):
        stem = name.removesuffix("weight")
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        layer = SimpleNamespace(
            bits=4, pack_factor=8, maxq=15, dequant_dtype=torch.int8, planar=False, _init_wf_unsqueeze_buffers=lambda: None,
            wf_unsqueeze_zero=shifts.view(1, 1, 8), wf_unsqueeze_neg_one=shifts.view(1, 8, 1),
            qweight=tensors[f"{stem}qweight"], qzeros=tensors[f"{stem}qzeros"] + 0x11111111,
            scales=tensors[f"{stem}scales"].float(), g_idx=tensors[f"{stem}g_idx"], in_features=checkpoint.specs[name].cols,
        )  # fmt: skip
        layer._dequantize_from_codes = partial(quantized.PackableQuantLinear._dequantize_from_codes, layer)
        theirs = quantized.PackableQuantLinear.dequantize_weight(layer).T
        assert torch.equal(load(checkpoint, name, torch.float32), theirs), name

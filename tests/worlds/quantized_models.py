"""Tiny models whose weights are stored in 4 and 8 bits, written from the descriptions of the formats, number by number.

Nothing here uses the readers of the workbench, or a library of a format: `tests/quantized/test_libraries.py` compares with those.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worlds.tiny import VOCABULARY, save_tokenizer

Tensors = dict[str, Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of eight -> which comes first in a word of AWQ."""
LAYOUTS = ("nf4", "fp4", "nf4-double", "int8", "group", "group-zeros", "channel", "channel8", "tensor", "order", "nvfp4")
TRANSPOSED = ("gptq", "gptq_v2", "gptq-order", "awq")


def save_gpt_oss(out: Path) -> Path:
    """Save a random gpt-oss whose experts are whole blocks of 32: hidden size 32, feed-forward 64."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    more = {"vocab_size": VOCABULARY, "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    layers = ["sliding_attention", "full_attention"]
    config = GptOssConfig(
        num_hidden_layers=2, layer_types=layers, bos_token_id=None, eos_token_id=1, pad_token_id=None, **sizes, **more
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(out)
    save_tokenizer(out)
    return out


def e2m1(code: int) -> float:
    """Return what a number of 4 bits is worth."""
    return -E2M1[code - 8] if code > 7 else E2M1[code]


def draw(*shape: int, most: int, seed: int) -> Tensor:
    """Return random codes from 0 to `most`."""
    return torch.randint(0, most + 1, shape, generator=torch.Generator().manual_seed(seed))


def words(codes: Tensor, bits: int) -> Tensor:
    """Return rows of codes in words of 32 bits, the first code in the lowest bits; the last word is filled with zeros."""
    per, rows = 32 // bits, []
    for row in codes.tolist():
        row += [0] * (-len(row) % per)
        packed = [sum(code << (bits * i) for i, code in enumerate(row[at : at + per])) for at in range(0, len(row), per)]
        rows.append([number - 2**32 if number >= 2**31 else number for number in packed])
    return torch.tensor(rows, dtype=torch.int32)


def pairs(codes: list[int], *, high_first: bool) -> Tensor:
    """Return codes of 4 bits in bytes."""
    codes = [*codes, *([0] * (len(codes) % 2))]
    both = zip(codes[::2], codes[1::2], strict=True)
    return torch.tensor([(a << 4 | b) if high_first else (b << 4 | a) for a, b in both], dtype=torch.uint8)


def state(fields: dict[str, Any]) -> Tensor:
    """Return a JSON text as bitsandbytes stores it."""
    return torch.tensor([*json.dumps(fields).encode()], dtype=torch.uint8)


def bits_and_bytes(name: str, shape: tuple[int, int], kind: str, seed: int, size: int = 64) -> tuple[Tensors, Tensor]:
    """Return the tensors of a weight of 4 bits as bitsandbytes stores it, and what it is worth. `kind` is "nf4", "fp4" or with "-double"."""
    levels, count = (NF4 if kind.startswith("nf4") else FP4), shape[0] * shape[1]
    codes, blocks = draw(count, most=15, seed=seed).tolist(), -(-count // size)
    generator = torch.Generator().manual_seed(seed)
    largest = torch.rand(blocks, generator=generator) * 0.1 + 0.01
    short = kind.partition("-")[0]
    said: dict[str, Any] = {"quant_type": short, "blocksize": size, "dtype": "bfloat16", "shape": list(shape)}
    stored = {f"{name}.quant_map": torch.tensor(levels), f"{name}.absmax": largest}
    if kind.endswith("-double"):
        inner, outer = draw(blocks, most=255, seed=seed + 1), torch.rand(-(-blocks // 4), generator=generator) * 0.05
        table = torch.linspace(-1, 1, 256)
        said |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.125}
        stored |= {f"{name}.absmax": inner.to(torch.uint8), f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": table}
        largest = torch.stack([table[inner[i]] * outer[i // 4] + 0.125 for i in range(blocks)])
    stored[name] = pairs(codes, high_first=True).view(-1, 1)
    stored[f"{name}.quant_state.bitsandbytes__{short}"] = state(said)
    worth = torch.stack([torch.tensor(levels[code]) * largest[i // size] for i, code in enumerate(codes)])
    return stored, worth.view(shape)


def integers(name: str, shape: tuple[int, int], layout: str, seed: int) -> tuple[Tensors, Tensor]:
    """Return the tensors of a weight as compressed-tensors packs integers, and what it is worth."""
    (rows, cols), bits = shape, 8 if layout == "channel8" else 4
    groups = {"tensor": 1, "channel": 1, "channel8": 1}.get(layout, cols // 8)
    codes, generator = draw(rows, cols, most=2**bits - 1, seed=seed), torch.Generator().manual_seed(seed)
    scales = (torch.rand(1 if layout == "tensor" else rows, groups, generator=generator) * 0.02 + 0.001).bfloat16()
    stored = {
        f"{name}_packed": words(codes, bits),
        f"{name}_scale": scales.view(1) if layout == "tensor" else scales,
        f"{name}_shape": torch.tensor(shape),
    }
    zeros = torch.full((rows, groups), 2 ** (bits - 1))
    if layout == "group-zeros":
        zeros = draw(rows, groups, most=15, seed=seed + 1)
        stored[f"{name}_zero_point"] = words(zeros.T, bits).T.contiguous()
    group = [col // (cols // groups) for col in range(cols)]
    if layout == "order":
        group = torch.tensor(group)[torch.randperm(cols, generator=generator)].tolist()
        stored[f"{name}_g_idx"] = torch.tensor(group, dtype=torch.int32)
    many = scales.float().expand(rows, groups)
    worth = [[(codes[r, c] - zeros[r, group[c]]).float() * many[r, group[c]] for c in range(cols)] for r in range(rows)]
    return stored, torch.tensor(worth)


def nvfp4(name: str, shape: tuple[int, int], seed: int) -> tuple[Tensors, Tensor]:
    """Return the tensors of a weight in NVFP4, and what it is worth."""
    rows, cols = shape
    codes, generator = draw(rows, cols, most=15, seed=seed), torch.Generator().manual_seed(seed)
    scales = (torch.rand(rows, cols // 16, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
    whole = torch.tensor([7000.0])
    stored = {
        f"{name}_packed": torch.stack([pairs(row, high_first=False) for row in codes.tolist()]),
        f"{name}_scale": scales,
        f"{name}_global_scale": whole,
    }
    worth = [[e2m1(int(codes[r, c])) * (scales[r, c // 16].float() / whole[0]) for c in range(cols)] for r in range(rows)]
    return stored, torch.tensor(worth)


def transposed(name: str, shape: tuple[int, int], layout: str, seed: int) -> tuple[Tensors, Tensor]:
    """Return the tensors of a weight of GPTQ or AWQ with groups of 8 columns, and what it is worth."""
    (rows, cols), stem = shape, name.removesuffix(".weight")
    codes, zeros = draw(rows, cols, most=15, seed=seed), draw(cols // 8, rows, most=14, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(cols // 8, rows, generator=generator) * 0.02 + 0.001).half()
    stored, group = {f"{stem}.scales": scales}, [col // 8 for col in range(cols)]
    if layout == "awq":
        order = [8 * (i // 8) + AWQ_PLACES[i % 8] for i in range(rows)]
        stored[f"{stem}.qweight"], stored[f"{stem}.qzeros"] = words(codes.T[:, order], 4), words(zeros[:, order], 4)
    else:
        if layout == "gptq-order":
            group = torch.tensor(group)[torch.randperm(cols, generator=generator)].tolist()
        stored[f"{stem}.g_idx"] = torch.tensor(group, dtype=torch.int32)
        stored[f"{stem}.qweight"], stored[f"{stem}.qzeros"] = words(codes, 4).T.contiguous(), words(zeros, 4)
    less = int(layout in ("gptq", "gptq-order"))
    worth = [
        [(codes[r, c] - zeros[group[c], r] - less).float() * scales[group[c], r].float() for c in range(cols)]
        for r in range(rows)
    ]
    return stored, torch.tensor(worth)


def mxfp4(name: str, shape: tuple[int, int, int], seed: int) -> tuple[Tensors, Tensor]:
    """Return blocks and scales of experts [experts, columns, rows] in MXFP4, and what they are worth."""
    experts, cols, rows = shape
    codes = draw(experts, rows, cols, most=15, seed=seed)
    scales = draw(experts, rows, cols // 32, most=8, seed=seed + 1) + 115
    stored = {
        f"{name}_blocks": pairs(codes.flatten().tolist(), high_first=False).view(experts, rows, cols // 32, 16),
        f"{name}_scales": scales.to(torch.uint8),
    }
    worth = torch.empty(shape)
    for e in range(experts):
        for r in range(rows):
            for c in range(cols):
                worth[e, c, r] = e2m1(int(codes[e, r, c])) * 2.0 ** (int(scales[e, r, c // 32]) - 127)
    return stored, worth


def said(layout: str) -> dict[str, Any]:
    """Return the `quantization_config` of a layout."""
    if layout in ("nf4", "fp4", "nf4-double"):
        return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": layout[:3]}
    if layout == "int8":
        return {"quant_method": "bitsandbytes", "load_in_8bit": True}
    if layout in TRANSPOSED:
        method = "awq" if layout == "awq" else "gptq"
        more = {"version": "gemm"} if layout == "awq" else {"checkpoint_format": "gptq_v2" if layout == "gptq_v2" else "gptq"}
        return {"quant_method": method, "bits": 4, "group_size": 8, **more}
    if layout == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    weights: dict[str, Any] = {"num_bits": 8 if layout == "channel8" else 4, "type": "int", "symmetric": layout != "group-zeros"}
    weights["strategy"] = {"channel8": "channel", "channel": "channel", "tensor": "tensor"}.get(layout, "group")
    weights["actorder"] = "group" if layout == "order" else None
    form = "nvfp4-pack-quantized" if layout == "nvfp4" else "pack-quantized"
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


def eight_bits(name: str, shape: tuple[int, int], seed: int) -> tuple[Tensors, Tensor]:
    """Return a weight of 8 bits as bitsandbytes stores it, and what it is worth."""
    codes = (draw(*shape, most=254, seed=seed) - 127).to(torch.int8)
    scales = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) * 0.2 + 0.01
    stem = name.removesuffix(".weight")
    stored = {name: codes, f"{stem}.SCB": scales, f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, codes.float() * scales[:, None] * 7.874015718698502e-3


def quantize(base: Path, layout: str) -> Tensors:
    """Store the projections of a model in another layout with random numbers, in place.

    Args:
        base: A model directory with one file.
        layout: One of `LAYOUTS` or `TRANSPOSED`, or "mxfp4" for the experts of gpt-oss.

    Returns:
        What each tensor is worth, in float32.
    """
    makers: dict[str, Callable[..., tuple[Tensors, Tensor]]] = {
        **{kind: partial(bits_and_bytes, kind=kind) for kind in ("nf4", "fp4", "nf4-double")},
        **{kind: partial(transposed, layout=kind) for kind in TRANSPOSED},
        **{"int8": eight_bits, "nvfp4": nvfp4, "mxfp4": mxfp4},
    }
    make = makers.get(layout) or partial(integers, layout=layout)
    stored: Tensors = {}
    worth: Tensors = {}
    for seed, (name, values) in enumerate(load_file(base / "model.safetensors").items()):
        if not name.endswith("_proj" if layout == "mxfp4" else "_proj.weight"):
            stored[name], worth[name] = values, values.float()
            continue
        made, worth[name] = make(name, tuple(values.shape), seed=10 * seed)
        stored |= made
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": said(layout)}), "utf-8")
    return worth

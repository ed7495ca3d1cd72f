"""Tiny models whose weights are stored in 8 bits with scales, in the layouts of the hub, and GGUF files as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from worlds.gguf_models import interleaved

Tensors = dict[str, torch.Tensor]
BLOCK = (16, 24)
"""Rows and columns of a block, which do not divide all the sizes of the tiny models."""


def blockwise(values: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return stored numbers and one scale a block [rows, columns] of a matrix, computed block by block."""
    rows, cols = values.shape
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    stored, scales = torch.empty(rows, cols, dtype=dtype), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = values[part].float().abs().max() / torch.finfo(dtype).max
            stored[part] = (values[part].float() / scales[i, j]).to(dtype)
    return stored, scales


def save_fp8(base: Path, layout: str) -> Tensors:
    """Store the projections of a model in 8 bits, in place.

    Args:
        base: A model directory with one file.
        layout: "block" (DeepSeek-V3, FineGrainedFP8), "exponents" (the same with scales of 8 bits), "channel" (compressed-tensors),
            "tensor" (a scale for a tensor, and one for activations), "plain" (no scales) or "e5m2" (no scales, two bits of mantissa).

    Returns:
        What each tensor is worth, in float32, computed value by value.
    """
    config = json.loads((base / "config.json").read_text("utf-8"))
    stored: Tensors = {}
    worth: Tensors = {}
    for name, values in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name], worth[name] = values, values.float()
            continue
        dtype = torch.float8_e5m2 if layout == "e5m2" else torch.float8_e4m3fn
        if layout in ("block", "exponents"):
            codes, scales = blockwise(values, BLOCK, dtype)
            if layout == "exponents":
                scales = scales.log2().ceil().exp2()
                full = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: values.shape[0], : values.shape[1]]
                codes = (values.float() / full).to(dtype)
            stored[f"{name}_scale_inv"] = scales.to(torch.float8_e8m0fnu) if layout == "exponents" else scales
            worth[name] = torch.tensor(
                [
                    [codes[i, j].float() * scales[i // BLOCK[0], j // BLOCK[1]] for j in range(values.shape[1])]
                    for i in range(values.shape[0])
                ]
            )
        elif layout == "channel":
            scales = (values.float().abs().amax(1, keepdim=True) / 448).bfloat16()
            codes = (values.float() / scales.float()).to(dtype)
            stored[f"{name}_scale"] = scales
            worth[name] = codes.float() * scales.float()
        elif layout == "tensor":
            scale = values.float().abs().max() / 448
            codes = (values.float() / scale).to(dtype)
            stored[f"{name}_scale"], stored[f"{name.removesuffix('weight')}input_scale"] = scale, torch.tensor(0.5)
            worth[name] = codes.float() * scale
        else:
            codes = values.to(dtype)
            worth[name] = codes.float()
        stored[name] = codes
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    said: dict[str, Any] = {
        "block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
        "exponents": {"quant_method": "fp8", "weight_block_size": list(BLOCK), "scale_fmt": "ue8m0"},
        "channel": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
        },
        "tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    }
    if layout in said:
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": said[layout]}), "utf-8")
    return worth


_NAMES = {
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "gemma": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(base: Path, out: Path, architecture: str, kind: str = "F32", *, extra: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint as GGUF, as llama.cpp's converter does: matrices of the given kind, vectors in float32.

    Args:
        base: The checkpoint, in one file.
        out: The GGUF file.
        architecture: Its name in GGUF files: "llama", "qwen2", "qwen3", "gemma2" or "gemma3".
        kind: Kind of the matrices: "F32", "F16", "BF16", or a kind of blocks whose size divides the columns.
        extra: Further fields of the architecture.
    """
    config = json.loads((base / "config.json").read_text("utf-8"))
    heads, grouped = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(grouped)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if architecture == "llama":
        writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    for name, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{architecture}.{name}", value)
    _add_vocabulary(writer, config["vocab_size"])
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = interleaved(values, heads if ".q_proj." in name else grouped)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        target = kind if values.ndim > 1 else "F32"
        stored = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[target])
        writer.add_tensor(_gguf_name(name, architecture), stored, raw_dtype=gguf.GGMLQuantizationType[target])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Write a byte-level vocabulary: two special tokens, letters, and some pairs with their merges."""
    letters = [*"Ġabcdefghijklmnopqrstuvwxyz0123456789.,?!"]
    pairs = [
        "th",
        "he",
        "in",
        "an",
        "re",
        "on",
        "at",
        "en",
        "nd",
        "ti",
        "es",
        "or",
        "te",
        "of",
        "ed",
        "is",
        "it",
        "al",
        "ar",
        "st",
        "to",
    ]
    words = ["<unk>", "<eos>", *letters, *pairs]
    assert len(words) <= size
    words += [f"<unused{i}>" for i in range(size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if word.startswith("<") else gguf.TokenType.NORMAL for word in words])
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_eos_token_id(1)


def _gguf_name(name: str, architecture: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        number, _, rest = stem.removeprefix("model.layers.").partition(".")
        known = {**_MODULES, **_NAMES["gemma" if architecture.startswith("gemma") else "llama"]}
        return f"blk.{number}.{known[rest]}.{suffix}"
    return f"{ {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}[stem] }.{suffix}"

"""Random bf16 llama checkpoints for benchmarks: a base, three fine-tunes, three rank-16 adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

SHAPES = {
    "S": (24, 1280, 3584, 20),
    "M": (24, 2048, 8192, 32),
    "XS": (4, 256, 512, 4),
    "8B": (32, 4096, 14336, 32),
    "8B-8": (8, 4096, 14336, 32),
}
"""Name -> layers, hidden size, MLP size, heads."""
VOCABULARY = 32000
SPARSE = ("8B",)
"""Sizes whose checkpoints are files of zeros without blocks on disk: for memory, not for numbers."""


def make_models(folder: Path, size: str, bricks: bool = True, device: str = "cpu") -> None:
    """Write a base and, with `bricks`, the fine-tunes `a b c` and adapters `la lb lc`; `device` generates the numbers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers, hidden, mlp, heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    shapes = _shapes(size)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    base = {} if size in SPARSE else {n: drawn(s, 0.02).bfloat16().cpu() for n, s in shapes.items()}
    for name in ("base", "a", "b", "c") if bricks else ("base",):
        (folder / name).mkdir()
        config.save_pretrained(folder / name)
        if size in SPARSE:
            write_sparse(folder / name / "model.safetensors", shapes)
            continue
        tensors = base
        if name != "base":
            tensors = {k: (v.to(device).float() + drawn(tuple(v.shape), 1e-3)).bfloat16().cpu() for k, v in base.items()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    for name in ("la", "lb", "lc") if bricks else ():
        (folder / name).mkdir()
        factors = {}
        for weight, shape in shapes.items():
            if "_proj" in weight:
                key = f"base_model.model.{weight.removesuffix('.weight')}"
                factors[f"{key}.lora_A.weight"] = drawn((16, shape[1]), 0.02).bfloat16().cpu()
                factors[f"{key}.lora_B.weight"] = drawn((shape[0], 16), 0.02).bfloat16().cpu()
        save_file(factors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / name / "adapter_config.json").write_text(
            json.dumps(
                {
                    "peft_type": "LORA",
                    "task_type": "CAUSAL_LM",
                    "r": 16,
                    "lora_alpha": 16,
                    "base_model_name_or_path": str(folder / "base"),
                    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                }
            )
        )


def _shapes(size: str) -> dict[str, tuple[int, ...]]:
    layers, hidden, mlp, _ = SHAPES[size]
    vocabulary = 128256 if size == "8B" else VOCABULARY
    linear = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"model.layers.{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of bf16 zeros that takes no blocks on disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)

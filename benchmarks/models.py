"""Random bf16 llama checkpoints for benchmarks: a base, three fine-tunes, three rank-16 adapters."""

from __future__ import annotations

import json
from pathlib import Path

SHAPES = {"S": (24, 1280, 3584, 20), "M": (24, 2048, 8192, 32), "XS": (4, 256, 512, 4)}
"""Name -> layers, hidden size, MLP size, heads."""
VOCABULARY = 32000


def make_models(folder: Path, size: str) -> None:
    """Base, fine-tunes `a b c` as checkpoints of one file, adapters `la lb lc`."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers, hidden, mlp, heads = SHAPES[size]
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False, dtype="bfloat16")  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden), "self_attn.v_proj": (hidden, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}  # fmt: skip
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"model.layers.{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    generator = torch.Generator().manual_seed(0)
    base = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()}
    for name in ("base", "a", "b", "c"):
        tensors = (
            base
            if name == "base"
            else {k: (v.float() + torch.randn(v.shape, generator=generator) * 1e-3).bfloat16() for k, v in base.items()}
        )
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder / name)
    for name in ("la", "lb", "lc"):
        (folder / name).mkdir()
        factors = {}
        for layer in range(layers):
            for module, (rows, cols) in linear.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                factors[f"{key}.lora_A.weight"] = (torch.randn(16, cols, generator=generator) * 0.02).bfloat16()
                factors[f"{key}.lora_B.weight"] = (torch.randn(rows, 16, generator=generator) * 0.02).bfloat16()
        save_file(factors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / name / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 16, "base_model_name_or_path": str(folder / "base"),
            "target_modules": [n.rpartition(".")[2] for n in linear]}))  # fmt: skip

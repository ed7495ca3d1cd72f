"""Tiny models of the decoder families that transformers can build from a configuration alone, and a growth of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny import VOCABULARY, save_tokenizer

LAYERS = 4
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "mlp_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "head_size", "global_head_dim", "sliding_window", "query_pre_attn_scalar", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "n_routed_experts", "num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "expert_dim", "shared_expert_intermediate_size"), 16),
    "num_experts_per_tok": 2, "vocab_size_per_layer_input": VOCABULARY, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
}  # fmt: skip
"""Field of a configuration -> a small value. A family takes those that it has."""


def tiny_config(family: str, **fields: Any) -> Any:
    """A family's configuration with small sizes, four layers."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    return kind(**{**{key: value for key, value in _SIZES.items() if key in known}, **fields})


def save_family(family: str, out: Path, fields: Mapping[str, Any] | None = None) -> Path:
    """A random float32 model of a family with a tokenizer; norms and biases are random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **(fields or {}))).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    save_tokenizer(out)
    return out

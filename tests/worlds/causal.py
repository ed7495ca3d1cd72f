"""Tiny configurations of all causal language models of transformers, as config.json states them."""

from __future__ import annotations

import json
from typing import Any

from worlds.growing import LAYERS, SIZES

HEADS, WIDTH, POSITIONS = 4, 32, 64
_MORE_SIZES: dict[str, Any] = {
    **SIZES,
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    "num_encoder_attention_heads": HEADS, **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dim_ff"), 48), "emb_dim": WIDTH,
    **dict.fromkeys(("max_target_positions", "max_source_positions", "max_seq_len", "context_length"), POSITIONS),
}  # fmt: skip
_ROBERTA = ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")
_BERT = ("bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "rembert", "roformer")
_FIELDS: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _BERT},
    **{name: {"pad_token_id": 0, "is_decoder": True} for name in _ROBERTA},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1, 3]},
    "cwm": {"bos_token_id": 0},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "sliding_window": 64},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"pad_token_id": 0},
    "gemma4_unified_text": {"pad_token_id": 0},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_key_value_heads": HEADS, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16, "chunk_size": 32},
    "modernbert-decoder": {"pad_token_id": 0, "bos_token_id": 0},
    "nemotron_h": {"chunk_size": 32},
    "prophetnet": {"pad_token_id": 0},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "step3p5": {"pad_token_id": 0},
    "xlm": {"pad_token_id": 0, "causal": True},
    "xmod": {"pad_token_id": 0, "is_decoder": True, "default_language": "en_XX"},
}  # fmt: skip
"""Type of model -> fields that it needs beside sizes."""
_AS_PUBLISHED = ("dots3_note", "emu3", "mllama", "moshi", "zamba", "zamba2", "zaya")
"""Types whose fields depend on each other in more ways: they have the sizes that transformers gives them, without memory for weights."""


def causal_types() -> list[str]:
    """Return the `model_type` of every configuration with a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_json(kind: str) -> dict[str, Any]:
    """Return the config.json of a tiny model: four layers and heads, 32 wide, 64 positions, also in the parts of a multimodal model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = CONFIG_MAPPING[kind]
    config = made() if kind in _AS_PUBLISHED else _tiny(made, **_FIELDS.get(kind, {}))
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {**data, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)]}


def _tiny(kind: Any, **fields: Any) -> Any:
    """Return a configuration with small values of the fields that its class has."""
    known = {*kind.__dataclass_fields__, *getattr(kind, "attribute_map", {})}
    parts = {
        name: _tiny(part, **_FIELDS.get(part.model_type, {})).to_dict()
        for name, part in kind.sub_configs.items()
        if isinstance(part, type) and part.__name__ != "AutoConfig"
    }
    latent = {"num_key_value_heads": HEADS} if "kv_lora_rank" in known else {}  # latent attention has keys for every head
    return kind(**{**{key: value for key, value in _MORE_SIZES.items() if key in known}, **latent, **parts, **fields})

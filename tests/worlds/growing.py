"""Tiny models of the decoder families that transformers can build from a configuration alone, and a growth of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from worlds.made import once
from worlds.tiny import VOCABULARY, randomize_vectors, save_tokenizer

LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner", "mlp_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "head_size", "global_head_dim", "sliding_window", "query_pre_attn_scalar", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "n_routed_experts", "num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "expert_dim", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8), "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8,
    "num_experts_per_tok": 2, "vocab_size_per_layer_input": VOCABULARY, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "block_multiple_of": 32,
}  # fmt: skip
"""Field of a configuration -> a small value. A family takes those that it has."""

STEPS = {
    "depth": "{grow: depth, blocks: 2}",
    "stack": "{grow: stack, order: [0, 1, 2, 1, 2, 3]}",
    "neurons": "{grow: width, neurons: 160}",
    "heads": "{grow: width, key_value_heads: 8}",
    "hidden": "{grow: width, hidden: 48}",
    "vocabulary": '{grow: vocabulary, tokens: ["<a>", "<b>"]}',
}
"""The growths of the table. Those with experts have tables of their own, in `grow/targets.py` and `mixtures.py`."""

_NAMES = (
    "afmoe apertus apertus1p5_text arcee aria_text beam bert bert-generation big_bird biogpt bitnet bloom codegen cohere "
    "cohere2 cohere2_moe ctrl deepseek_v2 deepseek_v4 diffllama doge electra ernie ernie4_5 ernie4_5_moe exaone exaone4 "
    "exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode "
    "gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text "
    "hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jetmoe kolibri1 "
    "laguna lara_mini lfm2 lfm3 llama llama4_text mamba megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2 "
    "minimax_m3_vl_text ministral ministral3 mistral mixtral moshi mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 "
    "olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text "
    "qwen3_moe qwen3_next rembert roformer rwkv sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 trocr "
    "vaultgemma xglm xlnet"
)
FAMILIES = _NAMES.split()
"""Families that build from small sizes alone, in alphabetical order."""

GROWN = {
    "depth": (
        "afmoe apertus apertus1p5_text arcee aria_text beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe "
        "deepseek_v2 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text glm glm4 "
        "glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa "
        "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 jetmoe "
        "kolibri1 laguna lara_mini lfm2 lfm3 llama llama4_text mamba mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text "
        "ministral ministral3 mistral mixtral mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt "
        "persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next sarvam_mla "
        "sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm"
    ),
    "stack": (
        "afmoe apertus apertus1p5_text arcee aria_text beam bert bert-generation biogpt bitnet bloom codegen cohere cohere2 "
        "cohere2_moe ctrl deepseek_v2 deepseek_v4 doge electra ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon "
        "flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese "
        "gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe "
        "hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lara_mini lfm2 lfm3 llama "
        "llama4_text mamba megatron-bert mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 mistral "
        "mixtral moshi mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 "
        "phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next rembert roformer rwkv sarvam_mla "
        "sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma xglm xlnet"
    ),
    "neurons": (
        "afmoe apertus apertus1p5_text arcee aria_text beam biogpt codegen cohere cohere2 cohere2_moe deepseek_v2 deepseek_v4 "
        "diffllama doge ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text "
        "gemma4_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe "
        "granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text "
        "internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lara_mini lfm2 lfm3 llama llama4_text mellum mimo_v2_flash "
        "minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi nanochat nemotron "
        "nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text "
        "qwen3_5_text qwen3_moe qwen3_next sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 trocr "
        "vaultgemma xglm"
    ),
    "heads": (
        "apertus apertus1p5_text arcee aria_text cohere cohere2 cohere2_moe ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe "
        "gemma gemma2 gemma3_text glm glm4 glm4_moe granite granitemoe granitemoeshared hunyuan_v1_dense hunyuan_v1_moe hy_v3 "
        "hyperclovax internlm3 iquestcoder jais2 kolibri1 lfm2 llama llama4_text mellum minimax_m3_vl_text ministral "
        "ministral3 mistral mixtral nanochat nemotron olmo phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 "
        "solar_open starcoder2 vaultgemma"
    ),
    "hidden": (
        "apertus apertus1p5_text arcee ernie4_5 exaone4 glm glm4 granite granite_swa hunyuan_v1_dense hyperclovax internlm3 "
        "iquestcoder llama ministral ministral3 mistral olmo2 olmo3 phi3 qwen2 qwen3 seed_oss smollm3"
    ),
    "vocabulary": (
        "afmoe apertus apertus1p5_text arcee aria_text beam bert-generation biogpt bitnet bloom codegen cohere cohere2 "
        "cohere2_moe deepseek_v2 diffllama doge electra ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo "
        "flint gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese "
        "gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe "
        "hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lara_mini lfm2 lfm3 llama "
        "llama4_text mamba mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral "
        "mixtral mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe "
        "qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next rembert rwkv sarvam_mla sarvam_moe seed_oss "
        "smollm3 solar_open stablelm starcoder2 trocr vaultgemma xglm xlnet"
    ),
}
"""Growth -> the families that it grows with the function kept (`stack`: with finite logits). The others are refused before any work."""

CAUGHT = {
    ("big_bird", "stack"): "differently from its source, layer",
    ("diffllama", "depth"): "differently from its source, layer",
    ("diffllama", "stack"): "differently from its source, layer",
    ("diffllama", "heads"): "computes something else",
    ("doge", "depth"): "computes something else",
    ("gemma4_text", "depth"): "; transformers builds",
    ("gemma4_text", "stack"): "; transformers builds",
    ("gpt_neox_japanese", "depth"): "has no parameter for",
    ("minicpm3", "depth"): "differently from its source, layer",
    ("minicpm3", "stack"): "differently from its source, layer",
    ("minimax", "depth"): "differently from its source, layer",
    ("minimax", "stack"): "differently from its source, layer",
    ("openai-gpt", "depth"): "computes something else",
}
"""Growths that nothing refuses in advance and the check stops: part of its message. What depends on the number or the count of layers
(DiffLlama, MiniCPM3, MiniMax), residual weights in a layer (Doge), heads that are paired."""


def tiny_config(family: str, **fields: Any) -> Any:
    """A family's configuration with small sizes, four layers."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    return kind(**{**{key: value for key, value in SIZES.items() if key in known}, **fields})


@once
def save_family(family: str, out: Path, fields: Mapping[str, Any] | None = None) -> Path:
    """A random float32 model of a family with a tokenizer; norms and biases, also of routers and experts, are random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **(fields or {}))).float()
    randomize_vectors(model)
    for name, tensor in model.state_dict().items():
        if "bias" in name and (tensor.dim() > 1 or name.endswith(("correction_bias", "expert_bias"))):
            tensor.add_(torch.randn_like(tensor) * 0.05)
    model.save_pretrained(out)
    save_tokenizer(out)
    return out


def logits_of(path: str | Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the float32 logits of the model in a directory; check that transformers loads it with nothing missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert {key: names for key, names in info.items() if names} == {}
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits

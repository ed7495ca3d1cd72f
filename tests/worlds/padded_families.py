"""Random models of many architectures, two layers each: absolute, rotary and ALiBi positions, windows, experts, recurrent states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 64
_TOKENS = {"vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
_WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
         **_TOKENS}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS}
_GROUPED = {"num_key_value_heads": 2, **_WIDE}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_TOKENS}
_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
          "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}  # fmt: skip
_NEMOTRON = {"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
             "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "use_mamba_kernels": False}  # fmt: skip


def _without_depth(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "num_hidden_layers"}


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "gpt2": lambda: t.GPT2Config(**_GPT),
        "gpt_bigcode": lambda: t.GPTBigCodeConfig(**_GPT),
        "xglm": lambda: t.XGLMConfig(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64, **_TOKENS),
        "biogpt": lambda: t.BioGptConfig(**_WIDE),
        "opt": lambda: t.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                                   max_position_embeddings=64, **_TOKENS),
        "bloom": lambda: t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_TOKENS),
        "gpt_neox": lambda: t.GPTNeoXConfig(**_WIDE),
        "gpt_neo": lambda: t.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=4,
                                          attention_types=[[["global", "local"], 1]], max_position_embeddings=64, **_TOKENS),
        "gptj": lambda: t.GPTJConfig(rotary_dim=4, **_GPT),
        "llama": lambda: t.LlamaConfig(**_GROUPED),
        "qwen2": lambda: t.Qwen2Config(**_GROUPED),
        "gemma2": lambda: t.Gemma2Config(head_dim=8, sliding_window=4, query_pre_attn_scalar=8, **_GROUPED),
        "mistral": lambda: t.MistralConfig(sliding_window=4, **_GROUPED),
        "phi": lambda: t.PhiConfig(**_WIDE),
        "falcon": lambda: t.FalconConfig(**_FALCON),
        "falcon_alibi": lambda: t.FalconConfig(alibi=True, multi_query=False, **_FALCON),
        "mpt": lambda: t.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, **_TOKENS),
        "mixtral": lambda: t.MixtralConfig(num_local_experts=4, **_GROUPED),
        "mamba": lambda: t.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, **_TOKENS),
        "jamba": lambda: t.JambaConfig(**_JAMBA, **_GROUPED),
        "nemotron_h": lambda: t.NemotronHConfig(**_NEMOTRON, **_without_depth(_GROUPED)),
        "recurrent_gemma": lambda: t.RecurrentGemmaConfig(lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"],
                                                          head_dim=8, **{**_WIDE, "num_key_value_heads": 1}),
    }  # fmt: skip


NAMES = ("gpt2", "gpt_bigcode", "xglm", "biogpt", "opt", "bloom", "gpt_neox", "gpt_neo", "gptj", "llama", "qwen2", "gemma2", "mistral", "phi",
         "falcon", "falcon_alibi", "mpt", "mixtral", "mamba", "jamba", "nemotron_h", "recurrent_gemma")  # fmt: skip


def random_model(name: str, vocabulary: int = VOCABULARY) -> Any:
    """A model of a family in float32, in evaluation mode, every parameter random and none of them small."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = _configs()[name]()
    config.vocab_size = vocabulary
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
    return model

"""Tiny random models of many architectures, and how the hub stores each: its names, its fused weights, its old buffers.

The hub's names are written here by hand, not by transformers, which has names of its own for several of them in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from worlds.tiny import VOCABULARY, save_tokenizer

Tensors = dict[str, Tensor]
LAYERS = 2
_COMMON = {"vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
_WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "max_position_embeddings": 64, **_COMMON}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, **_WIDE}
_GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, **_GROUPED}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, **_GROUPED}
# As deep as the text decoder, so that only its name tells it apart.
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 28,
           "patch_size": 14}  # fmt: skip


def config(family: str) -> Any:
    """A transformers configuration of a family."""
    import transformers as t

    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**_GROUPED),
        "qwen2": lambda: t.Qwen2Config(tie_word_embeddings=True, **_GROUPED),
        "qwen3": lambda: t.Qwen3Config(head_dim=8, **_GROUPED),
        "mistral": lambda: t.MistralConfig(sliding_window=8, **_GROUPED),
        "gemma2": lambda: t.Gemma2Config(**_GEMMA),
        "gemma3": lambda: t.Gemma3TextConfig(**_GEMMA),
        "gemma3_multimodal": lambda: t.Gemma3Config(text_config=_GEMMA, mm_tokens_per_image=4, vision_config=_VISION),
        "phi3": lambda: t.Phi3Config(**_GROUPED),
        "olmo2": lambda: t.Olmo2Config(**_GROUPED),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, **_COMMON),
        "gpt_neox": lambda: t.GPTNeoXConfig(**_WIDE),
        "mixtral": lambda: t.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **_GROUPED),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(head_dim=8, **_EXPERTS),
        "opt": lambda: t.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=LAYERS, num_attention_heads=4, word_embed_proj_dim=32,
                                   max_position_embeddings=64, **{**_COMMON, "pad_token_id": 0, "initializer_range": 0}, init_std=0.2),
        "granite": lambda: t.GraniteConfig(**_GROUPED),
        "qwen3_next": lambda: t.Qwen3NextConfig(
            head_dim=8, shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], **_EXPERTS),
        "granitemoehybrid": lambda: t.GraniteMoeHybridConfig(
            layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16,
            num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16, **_GROUPED),
        "jamba": lambda: t.JambaConfig(
            attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
            num_experts_per_tok=2, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4, **_GROUPED),
        "lfm2": lambda: t.Lfm2Config(layer_types=["conv", "full_attention"], block_multiple_of=8, **_GROUPED),
        "mamba": lambda: t.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=LAYERS, time_step_rank=4, **_COMMON),
    }  # fmt: skip
    return made[family]()


def _per_expert(block: str, names: tuple[str, str, str]) -> Callable[[Tensors], Tensors]:
    """Fused experts [E, 2f, d] and [E, d, f], as transformers has them in memory, one by one: gate, up, down."""

    def split(live: Tensors) -> Tensors:
        hub: Tensors = {}
        for name, tensor in live.items():
            stem = name.replace(".mlp.", f".{block}.") if block == "block_sparse_moe" else name
            root, _, kind = stem.rpartition(".")
            if kind == "gate_up_proj" and tensor.dim() == 3:
                for e, expert in enumerate(tensor):
                    hub[f"{root}.{e}.{names[0]}.weight"], hub[f"{root}.{e}.{names[1]}.weight"] = expert.chunk(2)
            elif kind == "down_proj" and tensor.dim() == 3:
                hub |= {f"{root}.{e}.{names[2]}.weight": expert for e, expert in enumerate(tensor)}
            else:
                hub[stem] = tensor
        return hub

    return split


def _renamed(*rules: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def rename(live: Tensors) -> Tensors:
        hub: Tensors = {}
        for name, tensor in live.items():
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            hub[name] = tensor
        return hub

    return rename


def _as_it_is(live: Tensors) -> Tensors:
    return dict(live)


def _mask(prefix: str, dtype: torch.dtype, masked: bool) -> Callable[[], Tensors]:
    """The causal mask, and the number that fills it, which old files hold for every layer."""
    mask = torch.ones(64, 64).tril().to(dtype).view(1, 1, 64, 64)
    return lambda: {f"{prefix.format(i)}.{n}": t.clone() for i in range(LAYERS)
                    for n, t in {"bias": mask, **({"masked_bias": torch.tensor(-1e9)} if masked else {})}.items()}  # fmt: skip


def _frequencies(prefix: str) -> Callable[[], Tensors]:
    return lambda: {f"{prefix.format(i)}.rotary_emb.inv_freq": 1e4 ** (-torch.arange(4) / 4) for i in range(LAYERS)}


@dataclass(frozen=True)
class Hub:
    """How the hub stores a family.

    Attributes:
        family: Of `config`.
        names: The live model's tensors under the hub's names.
        buffers: What its files hold beside weights.
        stored_head: Whether a tied head is stored a second time.
        silent: Fields of config.json that its files do not have.
        more: Fields of config.json that only its files have.
        prefix: What stands before a layer's number.
    """

    family: str
    prefix: str = "model.layers."
    names: Callable[[Tensors], Tensors] = _as_it_is
    buffers: Callable[[], Tensors] = dict
    stored_head: bool = False
    silent: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


_HF_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_GEMMA3_NAMES = _renamed(
    (r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."))  # fmt: skip
_GRANITE_NAMES = _renamed(
    (r"moe\.experts\.gate_up_proj$", "moe.input_linear.weight"), (r"moe\.experts\.down_proj$", "moe.output_linear.weight"),
    (r"moe\.router\.weight$", "moe.router.layer.weight"))  # fmt: skip
LAYOUTS = {
    "llama": Hub("llama"),
    "llama, old file": Hub("llama", buffers=_frequencies("model.layers.{}.self_attn")),
    "qwen2, tied": Hub("qwen2"),
    "qwen2, tied, head stored": Hub("qwen2", stored_head=True),
    "qwen3": Hub("qwen3"),
    "mistral": Hub("mistral"),
    "gemma2": Hub("gemma2", silent=("tie_word_embeddings",)),
    "gemma2, head stored": Hub("gemma2", stored_head=True, silent=("tie_word_embeddings",)),
    "gemma3": Hub("gemma3"),
    "gemma3, multimodal": Hub("gemma3_multimodal", "language_model.model.layers.", _GEMMA3_NAMES),
    "gemma3, multimodal, head stored": Hub("gemma3_multimodal", "language_model.model.layers.", _GEMMA3_NAMES, stored_head=True),
    "phi3": Hub("phi3", more={"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}),
    "olmo2": Hub("olmo2"),
    "gpt2": Hub("gpt2", "h.", _renamed((r"^transformer\.", "")), _mask("h.{}.attn", torch.float32, False), silent=("tie_word_embeddings",)),
    "gpt2, prefixed": Hub("gpt2", "transformer.h.", silent=("tie_word_embeddings",), stored_head=True,
                          buffers=_mask("transformer.h.{}.attn", torch.uint8, True)),
    "gpt_neox": Hub("gpt_neox", "gpt_neox.layers.", _renamed((r"^lm_head\.", "embed_out.")),
                    lambda: _mask("gpt_neox.layers.{}.attention", torch.bool, True)() | _frequencies("gpt_neox.layers.{}.attention")()),
    "mixtral": Hub("mixtral", names=_per_expert("block_sparse_moe", ("w1", "w3", "w2"))),
    "qwen3_moe": Hub("qwen3_moe", names=_per_expert("mlp", _HF_EXPERTS)),
    "opt": Hub("opt", "model.decoder.layers.", stored_head=True, silent=("tie_word_embeddings",)),
    "granite": Hub("granite"),
    "qwen3_next": Hub("qwen3_next", names=_per_expert("mlp", _HF_EXPERTS)),
    "granitemoehybrid": Hub("granitemoehybrid", names=_GRANITE_NAMES),
    "jamba": Hub("jamba", names=_per_expert("feed_forward", _HF_EXPERTS)),
    "lfm2": Hub("lfm2"),
    "mamba": Hub("mamba", "backbone.layers.", stored_head=True),
}  # fmt: skip


def model_class(family: str) -> Any:
    """The class that `AutoModelForCausalLM` takes for a family."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config(family))]


def live_model(family: str, seed: int, near: Any = None, scale: float = 0.05) -> Any:
    """A random float32 model: fresh, norms and biases random too, or another one plus noise on every weight."""
    torch.manual_seed(seed)
    model = model_class(family)(config(family)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if near is not None:
                parameter.copy_(near.get_parameter(name) + scale * torch.randn_like(parameter))
            elif parameter.dim() == 1 or "embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_hub(model: Any, layout: str, out: Path) -> Path:
    """A model as the hub stores it: one safetensors file, config.json, a tokenizer, a README with its licence."""
    hub = LAYOUTS[layout]
    live = {n: t.detach() for n, t in model.state_dict().items()}
    if model.all_tied_weights_keys and not hub.stored_head:
        live = {n: t for n, t in live.items() if n not in model.all_tied_weights_keys}
    out.mkdir(parents=True)
    tensors = {n: t.contiguous().clone() for n, t in {**hub.names(live), **hub.buffers()}.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    data = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__], **hub.more}
    (out / "config.json").write_text(json.dumps({k: v for k, v in data.items() if k not in hub.silent}), "utf-8")
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\n", "utf-8")
    save_tokenizer(out)
    return out


def save_native(model: Any, out: Path) -> Path:
    """A model under the names that transformers has in memory: `save_pretrained(save_original_format=False)`."""
    model.save_pretrained(out, save_original_format=False)
    save_tokenizer(out)
    return out

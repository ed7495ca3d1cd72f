"""Tiny random mixture-of-experts models, and texts for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from worlds.made import once
from worlds.tiny import VOCABULARY, WORDS, save_tokenizer

EXPERTS, LAYERS = 6, 2
_WIDE = {
    "vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.2, "hidden_size": 32,
    "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 24, **_WIDE}


def configs() -> dict[str, Callable[[], Any]]:
    """Family -> its configuration: six experts, of which a token takes two. qwen2_moe, flex_olmo and olmoe do not make their weights add up to one."""
    import transformers as t

    return {
        "mixtral": lambda: t.MixtralConfig(num_local_experts=EXPERTS, sliding_window=None, **_WIDE),
        "qwen2_moe": lambda: t.Qwen2MoeConfig(num_experts=EXPERTS, num_experts_per_tok=2, shared_expert_intermediate_size=16, **_MOE),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(num_experts=EXPERTS, num_experts_per_tok=2, head_dim=8, norm_topk_prob=True, **_MOE),
        "flex_olmo": lambda: t.FlexOlmoConfig(num_experts=EXPERTS, num_experts_per_tok=2, **_WIDE),
        "granitemoe": lambda: t.GraniteMoeConfig(num_local_experts=EXPERTS, num_experts_per_tok=2, **_WIDE),
        "ernie4_5_moe": lambda: t.Ernie4_5_MoeConfig(
            moe_num_experts=EXPERTS, moe_k=2, moe_num_shared_experts=0, moe_layer_start_index=0, moe_layer_end_index=LAYERS - 1,
            moe_layer_interval=1, **_MOE),
        "jetmoe": lambda: t.JetMoeConfig(num_local_experts=EXPERTS, num_experts_per_tok=2, kv_channels=8, **_WIDE),
        "olmoe": lambda: t.OlmoeConfig(num_experts=EXPERTS, num_experts_per_tok=2, **_WIDE),
        "gpt_oss": lambda: t.GptOssConfig(num_local_experts=EXPERTS, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * LAYERS, **_WIDE),
        "deepseek_v3": lambda: t.DeepseekV3Config(
            n_routed_experts=EXPERTS, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
            q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
            **{**_MOE, "num_hidden_layers": LAYERS + 1, "num_key_value_heads": 4}),
    }  # fmt: skip


@once
def save_mixture(family: str, out: Path) -> Path:
    """A random float32 model with tokenizer. Correction biases and routers differ from expert to expert."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs()[family]())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.02)
            elif tensor.dim() == 1 and tensor.is_floating_point() and "inv_freq" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(out)
    save_tokenizer(out)
    return out


def write_lines(path: Path, words: list[str] = WORDS[2:], lines: int = 20, seed: int = 0) -> Path:
    """Texts of twelve random words each."""
    draw = random.Random(seed)
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=12))}) + "\n" for _ in range(lines)), "utf-8")
    return path


def hand_count(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """[layers, experts]: share of the places of all tokens, one text at a time, chosen from the logits of the routers, and from ernie's biases."""
    counts: dict[str, torch.Tensor] = {}
    routers = {n: m for n, m in model.named_modules() if n.endswith((".gate", ".router")) and hasattr(m, "weight")}

    def see(name: str) -> Any:
        def hook(module: Any, _args: Any, output: Any) -> None:
            statics = getattr(module, "moe_statics", None)
            scores = output[0] if statics is None else output[0].softmax(-1) + statics.e_score_correction_bias
            chosen = scores.topk(2, dim=-1).indices.flatten()
            counts[name] = counts.get(name, torch.zeros(EXPERTS)) + torch.bincount(chosen, minlength=EXPERTS)

        return hook

    hooks = [module.register_forward_hook(see(name)) for name, module in routers.items()]
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return torch.stack([counts[n] / counts[n].sum() for n in routers])


def live(path: str | Path) -> Any:
    """A saved model in float32; every tensor has a place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


def random_tokens(rows: int = 2, width: int = 24, seed: int = 1) -> torch.Tensor:
    """[rows, width]"""
    return torch.randint(2, 60, (rows, width), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, tokens: torch.Tensor) -> list[int]:
    """The continuation of one text, with a cache."""
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=0
    )
    found: list[int] = made[0].tolist()
    return found


def rows_of(path: Path) -> list[list[int]]:
    """The tokens of a file of texts."""
    return [[WORDS.index(word) for word in json.loads(line)["text"].split()] for line in path.read_text("utf-8").splitlines()]

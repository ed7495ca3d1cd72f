"""Tiny random models of the dense decoder families that edits support, and edits of them without a recipe around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from worlds.jsonl import write_jsonl
from worlds.made import once
from worlds.project import CPU, Project
from worlds.tiny import VOCABULARY, WORDS, save_tokenizer

from workbench.steps import MethodContext

LAYERS = 3
_COMMON = {"vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
_HEADS = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS, **_COMMON}
_WIDE = {"intermediate_size": 48, "max_position_embeddings": 64, **_HEADS}
_GROUPED = {"num_key_value_heads": 2, **_WIDE}
_GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, **_GROUPED}
_GPT = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, **_COMMON}

RATIO = {"granite": 0.22}
"""What a change of the projection's output is multiplied by on its way into the block's output, where it is not 1."""
SANDWICH = ("gemma2", "gemma3", "olmo2", "olmo3", "glm4")
"""Families with a norm behind the projection: no constant."""


def configs() -> dict[str, Callable[[], Any]]:
    """Family -> its configuration, with what sets it apart: windows, parallel blocks, post-norms, multipliers, ties."""
    import transformers as t

    return {
        "gpt2": lambda: t.GPT2Config(**_GPT),
        "gptj": lambda: t.GPTJConfig(rotary_dim=4, **_GPT),
        "gpt_neo": lambda: t.GPTNeoConfig(
            hidden_size=32, num_layers=LAYERS, num_heads=4, intermediate_size=48, window_size=8, max_position_embeddings=64,
            attention_types=[[["local"], 1], [["global", "local"], 1]], **_COMMON),
        "gpt_neox": lambda: t.GPTNeoXConfig(**_WIDE),
        "llama": lambda: t.LlamaConfig(**_GROUPED),
        "mistral": lambda: t.MistralConfig(sliding_window=8, **_GROUPED),
        "qwen2": lambda: t.Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, tie_word_embeddings=True, **_GROUPED),
        "qwen3": lambda: t.Qwen3Config(head_dim=8, **_GROUPED),
        "gemma": lambda: t.GemmaConfig(head_dim=8, **_GROUPED),
        "gemma2": lambda: t.Gemma2Config(**_GEMMA),
        "gemma3": lambda: t.Gemma3TextConfig(sliding_window_pattern=2, **_GEMMA),
        "phi": lambda: t.PhiConfig(partial_rotary_factor=0.5, **_WIDE),
        "phi3": lambda: t.Phi3Config(sliding_window=8, **_GROUPED),
        "olmo": lambda: t.OlmoConfig(clip_qkv=4.0, **_GROUPED),
        "olmo2": lambda: t.Olmo2Config(**_GROUPED),
        "olmo3": lambda: t.Olmo3Config(sliding_window=8, **_GROUPED),
        "opt": lambda: t.OPTConfig(
            ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2,
            **{**_HEADS, "pad_token_id": 0, "initializer_range": 0}),
        "falcon": lambda: t.FalconConfig(new_decoder_architecture=True, num_kv_heads=2, max_position_embeddings=64, **_HEADS),
        "bloom": lambda: t.BloomConfig(n_layer=LAYERS, n_head=4, **{k: v for k, v in _HEADS.items() if "num_" not in k}),
        "stablelm": lambda: t.StableLmConfig(**_GROUPED),
        "starcoder2": lambda: t.Starcoder2Config(sliding_window=8, **_GROUPED),
        "smollm3": lambda: t.SmolLM3Config(no_rope_layer_interval=2, **_GROUPED),
        "granite": lambda: t.GraniteConfig(residual_multiplier=0.22, embedding_multiplier=3.0, logits_scaling=2.0, **_GROUPED),
        "cohere": lambda: t.CohereConfig(logit_scale=1.0, **_GROUPED),
        "glm4": lambda: t.Glm4Config(head_dim=8, **_GROUPED),
        "ernie4_5": lambda: t.Ernie4_5Config(head_dim=8, **_GROUPED),
    }  # fmt: skip


@once
def save_dense(family: str, out: Path) -> Path:
    """A random float32 model with tokenizer; norms and biases are random too. Norms behind a projection are wide enough that a change
    in front of them can bring any word on top."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs()[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(
                    torch.randn_like(parameter) * 0.1 + (3.0 if re.search("post_(feedforward|mlp)_layernorm", name) else 0)
                )
    model.save_pretrained(out)
    save_tokenizer(out)
    return out


def context_of(project: Project, base: Path | str = "base") -> MethodContext:
    """What an edit step gets that is the first of a recipe."""
    from transformers import PreTrainedTokenizerFast

    from workbench.models.live import compute, live_model
    from workbench.run.compose import compose
    from workbench.weights.digests import tensor_digest

    resolved = project.resolve(f"base: {base}\nsteps: []\n", "context.yaml")
    current = compose(resolved, CPU).model
    tensors = compute(current, torch.float32, CPU)
    digests = {n: tensor_digest(t) for n, t in tensors.items()}
    live = live_model(current.config, tensors, resolved.tokenizer_path, CPU)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(resolved.tokenizer_path)  # AutoTokenizer gives qwen2 rules of its own
    return MethodContext(live, tokenizer, current, CPU, project.path, 0, lambda *_: None, resolved.cache, digests)


def without_cache(context: MethodContext, place: Path) -> MethodContext:
    """The same with an empty cache."""
    return replace(context, cache=place)


def write_facts_file(path: Path, count: int, target_words: int = 1) -> list[dict[str, str]]:
    """Facts of the tiny vocabulary, each with its own subject of two words."""
    rows = [
        {"id": f"f{i}", "prompt": f"w{i} of {{subject}}", "subject": f"w{i + 10} w{i + 11}",
         "target": " ".join(f"w{(7 * i + j + 30) % 60}" for j in range(target_words))}
        for i in range(count)
    ]  # fmt: skip
    write_jsonl(path, rows)
    return rows


def write_text(path: Path, words: int = 3000) -> Sequence[str]:
    """Random text of the tiny vocabulary, in paragraphs of 40 words: for statistics."""
    numbers = torch.randint(2, VOCABULARY, (words // 40, 40), generator=torch.Generator().manual_seed(7))
    texts = [" ".join(WORDS[i] for i in row) for row in numbers.tolist()]
    path.write_text("\n\n".join(texts), "utf-8")
    return texts

"""Texts of the tests' words, and models of families beside those of `tiny`, for methods that read texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from worlds.jsonl import write_jsonl
from worlds.made import once
from worlds.tiny import WORDS, save_tokenizer


def sentence(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(2, len(WORDS), (length,), generator=generator).tolist())


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Prompts and completions of different lengths, some longer than a sliding window of 8."""
    rows = [
        {"prompt": sentence(seed + i, 3 + 5 * i % 17), "completion": sentence(seed + 100 + i, 1 + i % 3)} for i in range(count)
    ]
    write_jsonl(path, rows)
    return path


def other_config(family: str) -> Any:
    """Families beside those of `tiny`: two kinds of rotary positions and windows, fused projections, experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}  # fmt: skip
    if family == "gemma3":
        return transformers.Gemma3TextConfig(
            head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], **sizes
        )
    if family == "phi3":
        return transformers.Phi3Config(**sizes)
    return transformers.MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **sizes)


@once
def save_other(out: Path, family: str) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(other_config(family)).save_pretrained(out)
    save_tokenizer(out)
    return out


def words_tokenizer(path: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(path)


def saved_names(live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixtral's fused experts as they lie on disk: w1 above w3 in one tensor, w2 in another, one slice an expert."""
    saved = {}
    for name, value in live.items():
        stem = name.partition("mlp.experts.")[0] + "block_sparse_moe.experts"
        for expert, part in enumerate(value) if ".mlp.experts." in name else ():
            if name.endswith("gate_up_proj"):
                saved[f"{stem}.{expert}.w1.weight"], saved[f"{stem}.{expert}.w3.weight"] = part.chunk(2)
            else:
                saved[f"{stem}.{expert}.w2.weight"] = part
        saved[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = value
    return saved

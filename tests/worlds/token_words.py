"""Tiny llamas with other vocabularies than their base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worlds.made import once
from worlds.project import CPU
from worlds.tiny import CHAT_TEMPLATE, config, edit_json, tensors_of

from workbench.resolve.resolved import Resolved
from workbench.vocabulary.tokens import read_tokens

SPECIAL = ["<unk>", "<eos>", "<pad>"]
BASE = [*SPECIAL, *(f"w{i}" for i in range(297))]
# The base's words in another order, two of them missing, four others instead.
OTHER = ["<unk>", "<new>", *(f"w{i}" for i in reversed(range(295))), "<eos>", "<pad>", "x0", "x1", "x2"]
THIRD = [*BASE, "x1", "y0"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_words(out: Path, words: Sequence[str], eos: str = "<eos>", template: str = CHAT_TEMPLATE) -> None:
    """A tokenizer of whole words; those in angle brackets are special added tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in words if w.startswith("<")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>", pad_token="<pad>")
    fast.chat_template = template
    fast.save_pretrained(out)


def save_llama(
    out: Path, words: Sequence[str], *, tied: bool = False, rows: int | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """A random llama with so many rows, and its tokenizer."""
    return save_random(out, config("llama" if tied else "llama_untied", layers=2), words, rows=rows, dtype=dtype)


@once
def save_random(
    out: Path, settings: Any, words: Sequence[str], *, rows: int | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """A random model of a configuration with so many rows, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings.vocab_size = rows or len(words)
    settings.eos_token_id, settings.pad_token_id = list(words).index("<eos>"), list(words).index("<pad>")
    model = AutoModelForCausalLM.from_config(settings)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.to(dtype).save_pretrained(out)
    save_words(out, words)
    return out


@once
def save_tuned(base: Path, out: Path, old: Sequence[str], words: Sequence[str], *, seed: int, rows: int | None = None,
               noise: float = 0.05, **settings: Any) -> Path:  # fmt: skip
    """A fine-tune of a base with other words: the rows of words that the base has lie near the base's."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    vocabulary = json.loads((base / "config.json").read_text("utf-8"))["vocab_size"]
    for name, tensor in tensors_of(base).items():
        values = tensor.float()
        if len(values) == vocabulary:
            moved = torch.randn(rows or len(words), *values.shape[1:], generator=generator) * 0.2
            for i, word in enumerate(words):
                if word in old:
                    moved[i] = values[list(old).index(word)]
            values = moved
        tensors[name] = (values + noise * torch.randn(values.shape, generator=generator)).to(tensor.dtype).contiguous()
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", out / "config.json")
    edit_json(out / "config.json", vocab_size=rows or len(words), eos_token_id=list(words).index("<eos>"),
              pad_token_id=list(words).index("<pad>"))  # fmt: skip
    save_words(out, words, **settings)
    return out


TWO = "bricks: {other: other, third: third}\n"
MIX = "steps: [{merge: task_arithmetic, bricks: {other: 0.6, third: 0.7}, lambda: 0.9}]\n"


def recipe(block: str, steps: str = MIX, bricks: str = TWO) -> str:
    return f"{bricks}tokenizer: {block}\n{steps}"


def by_token(tensor: Tensor, tokens: dict[str, int]) -> dict[str, Tensor]:
    return {token: tensor[i] for token, i in tokens.items()}


def input_rows(vocabularies: Path, name: str, tensor: str = EMBED) -> dict[str, Tensor]:
    return by_token(tensors_of(vocabularies / name)[tensor].float(), read_tokens(vocabularies / name, name).ids)


def tensors_in_memory(resolved: Resolved, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    from workbench.models.live import compute
    from workbench.run.compose import compose

    return compute(compose(resolved, CPU).model, dtype, CPU)

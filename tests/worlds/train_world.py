"""What tests of the trainer train: a two-layer model with a word tokenizer, rows that reverse two words."""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from worlds.jsonl import write_jsonl
from worlds.made import once

from workbench.train.spec import TrainSpec

WORDS = "a b c d say back is then".split()


@once
def save_base(out: Path) -> Path:
    """A random Llama of two layers, 32 wide, with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=1, pad_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    return out


def save_rows(folder: Path) -> Path:
    """Sixteen rows, one a prompt."""
    path = folder / "train.jsonl"
    rows = [{"prompt": f"say {one} then {two} is", "completion": f"{two} {one}"} for one in "abcd" for two in "abcd"]
    write_jsonl(path, rows)
    return path


def lora(**changes: Any) -> TrainSpec:
    length = {} if "epochs" in changes else {"steps": 30}
    return TrainSpec(**{"rank": 4, "alpha": 8, "learning_rate": 2e-2, **length, "warmup": 2, **changes})

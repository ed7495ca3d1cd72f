"""Two tokenizers over the words of one small language, a teacher that knows which word follows which, and a base that does not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from worlds.made import once

WORDS = ["kato", "mira", "sole", "nuvi", "patre", "dolan", "riko", "vesta", "lumo", "tarn", "ilse", "bago"]
CHOICES = torch.tensor([0.6, 0.25, 0.1, 0.05])
"""Probabilities of the words that may follow a word."""


def following(word: int) -> list[int]:
    """The words that may follow a word, the most probable one first."""
    return [(word * step + shift) % len(WORDS) for step, shift in ((5, 1), (7, 3), (1, 6), (11, 4))]


def text(seed: int, length: int = 12) -> str:
    """Words of the language, each with a space in front."""
    generator = torch.Generator().manual_seed(seed)
    word = int(torch.randint(len(WORDS), (1,), generator=generator))
    words = [word]
    for _ in range(length - 1):
        words.append(following(words[-1])[int(torch.multinomial(CHOICES, 1, generator=generator))])
    return "".join(f" {WORDS[word]}" for word in words)


def byte_pairs(texts: Iterable[str], size: int, first: str | None = None) -> Any:
    """A byte-level tokenizer trained on texts, which puts the token `first` in front of each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<end>", *([first] if first else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet))
    if first:
        made.post_processor = processors.TemplateProcessing(f"{first} $A", None, [(first, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token=first, clean_up_tokenization_spaces=False)


@once
def save_base(out: Path, *, size: int = 285, first: str | None = None) -> Path:
    """A random Llama whose tokenizer splits every word into several tokens."""
    tokenizer = byte_pairs((text(seed) for seed in range(50)), size, first)
    return _save(out, tokenizer, _config(len(tokenizer), 32, 2), seed=0)


@once
def save_teacher(out: Path, *, first: str | None = None) -> Path:
    """A Llama whose tokens are whole words, with the probabilities of the language as its head.

    Its one layer adds nothing. The embedding of a token is a row of the identity, which the final norm multiplies by √width, so the
    logits after a word are those that the head has for it.
    """
    tokenizer = byte_pairs((text(seed) for seed in range(50)), 500, first)
    width = -(-len(tokenizer) // 8) * 8
    config = _config(len(tokenizer), width, 1)
    config.tie_word_embeddings = False
    logs = torch.full((len(tokenizer), len(tokenizer)), -12.0)
    ids = [tokenizer.convert_tokens_to_ids(f"\u0120{word}") for word in WORDS]
    assert tokenizer.unk_token_id not in ids
    assert None not in ids
    for word, row in enumerate(ids):
        for other, share in zip(following(word), CHOICES.tolist(), strict=True):
            logs[row, ids[other]] = torch.tensor(share).log()

    def fill(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "layernorm" not in name and name != "model.norm.weight":
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), width))
        model.lm_head.weight[:, : len(tokenizer)] = logs.T / width**0.5

    return _save(out, tokenizer, config, seed=0, fill=fill)


def _config(vocabulary: int, width: int, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
    )


def _save(out: Path, tokenizer: Any, config: Any, *, seed: int, fill: Any = None) -> Path:
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    if fill:
        with torch.no_grad():
            fill(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@torch.no_grad()
def nats(place: Path, texts: Iterable[str]) -> float:
    """Mean −log p of the tokens of some texts, without the first token of each, under a model on disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    total, count = 0.0, 0
    for words in texts:
        ids = torch.tensor([tokenizer(words)["input_ids"]])
        logs = model(ids).logits[0, :-1].log_softmax(-1)
        total -= float(logs.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count

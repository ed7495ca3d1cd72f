"""Tokenizers as published models have them, over a few words: where they put marks of spaces, and which special tokens they add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worlds.made import once

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["The", "capital", "of", "France", "Paris", "Rome", "Italy", "said", "Answer", "London", "is"]
TEXTS = [(f"The capital of {country} is", f" {city}") for country, city in (("France", "Paris"), ("Italy", "Rome"))]


def _byte_pairs(pieces: Sequence[str], letters: Sequence[str]) -> Any:
    """Byte pairs whose merges give each piece, letter by letter."""
    from tokenizers.models import BPE

    vocabulary = {
        token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *letters, *(c for piece in pieces for c in piece)]))
    }
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        mark, word = (piece[0], piece[1:]) if piece[0] in "\u2581\u0120 " else ("", piece)
        parts = [(word[:i], word[i]) for i in range(1, len(word))] + ([(mark, word)] if mark else [])
        for one, other in parts:
            if (one, other) not in merges:
                merges.append((one, other))
            vocabulary.setdefault(one + other, len(vocabulary))
    return BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True)


def _marked(*more: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer(_byte_pairs([*(f"\u2581{word}" for word in WORDS), *more], ["\u2581", "\n", ":", "(", ")", "x"]))


def _byte_level(*more: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer(_byte_pairs([*WORDS, *(f"\u0120{word}" for word in WORDS), *more], ["\u0120", "\u010a", ":", "(", ")", "x"]))


def _llama2() -> Any:
    from tokenizers import decoders, normalizers

    made = _marked()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


def _mistral() -> Any:
    from tokenizers import decoders, pre_tokenizers

    made = _marked()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    return made


def _always() -> Any:
    from tokenizers import decoders, pre_tokenizers

    made = _marked()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return made


def _gemma() -> Any:
    from tokenizers import decoders, normalizers

    made = _marked(*WORDS)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return made


def _qwen() -> Any:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors

    made = _byte_level(":\u010a")
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[^\sA-Za-z]+[\r\n]*|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    made.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    made.decoder = decoders.ByteLevel()
    return made


def _llama3() -> Any:
    """As Qwen, with offsets that leave spaces out."""
    from tokenizers import processors

    made = _qwen()
    made.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    return made


def _trimmed() -> Any:
    """Byte pairs across words, with a token that ends in a space which its offsets leave out."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors

    made = Tokenizer(_byte_pairs([":\u0120", *WORDS, *(f"\u0120{word}" for word in WORDS)], ["\u0120", "\u010a", "(", ")", "x"]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.decoder = decoders.ByteLevel()
    return made


def _gpt2() -> Any:
    from tokenizers import decoders, pre_tokenizers, processors

    made = _byte_level()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.decoder = decoders.ByteLevel()
    return made


def _plain() -> Any:
    """Byte pairs over the text as it is: no mark of spaces, no pre-tokenizer, tokens that hold brackets of two texts."""
    from tokenizers import Tokenizer, decoders

    made = Tokenizer(_byte_pairs([*WORDS, *(f" {word}" for word in WORDS), "()", "( )"], [" ", "\n", ":", "(", ")", "x"]))
    made.decoder = decoders.Fuse()
    return made


# Kind -> the tokenizer, and what it puts around a text.
_KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama2": (_llama2, "<s> $A"), "mistral": (_mistral, "<s> $A"), "metaspace": (_always, "$A"), "gemma": (_gemma, "<s> $A"),
    "qwen": (_qwen, "$A"), "llama3": (_llama3, "$A"), "gpt2": (_gpt2, "$A"), "trimmed": (_trimmed, "$A"), "plain": (_plain, "$A"),
    "llama2_ends": (_llama2, "<s> $A </s>"),
}  # fmt: skip
KINDS = tuple(_KINDS)


def written(kind: str) -> Any:
    """A tokenizer of one kind as transformers loads it."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    make, around = _KINDS[kind]
    tokenizer = make()
    tokenizer.add_special_tokens(SPECIAL)
    if around != "$A":
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@once
def save_model(out: Path, kind: str) -> Path:
    """A random Llama of two layers with a tokenizer of one kind."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = written(kind)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, eos_token_id=2, bos_token_id=1, pad_token_id=2, max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out

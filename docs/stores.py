"""What each folder of the cache, and each folder of results, depends on: the list that tests hold the keys to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PARTS = ("tensors", "config", "tokens", "template", "generation", "dtype", "device")
"""Parts of a model's identity, the dtype of a recipe's output, and the device with the versions of the libraries."""


class Store(NamedTuple):
    """A folder of stored results.

    Attributes:
        holds: What its files are.
        parts: Parts that every key in it covers, as far as the recipe's steps read them.
        without: Why the other parts do not change the results.
    """

    holds: str
    parts: str
    without: str


_FLOAT32 = "The step computes on float32 weights of the text model; generated text and the output do not matter."
_NO_CHAT = "Prompts are read as they are, without a template, on float32 weights."
_MERGED = f"{_NO_CHAT} Nothing is generated."

STORES: Mapping[str, Store] = {
    "edits": Store(
        "adapters that edit and steer steps solved",
        "tensors config tokens device",
        f"{_NO_CHAT} The template counts for `edit: adapter` with `chat`.",
    ),
    "moments": Store("second moments of a layer's inputs", "tensors config tokens device", _MERGED),
    "values": Store("optimized values of facts", "tensors config tokens device", _MERGED),
    "sweeps": Store("layers and positions that `auto` chose", "tensors config tokens device", _MERGED),
    "memories": Store(
        "memories",
        "tensors config tokens dtype device",
        "Facts are learned on the weights as they are written, by plain prompts.",
    ),
    "grace": Store(
        "learned entries of a codebook", "tensors config tokens device", "The dtype counts through the rounded weights."
    ),
    "bricks": Store(
        "bricks that steps trained",
        "tensors config tokens device",
        f"{_FLOAT32} The template counts where rows are conversations.",
    ),
    "grown": Store(
        "trained parameters of grow steps",
        "tensors config tokens device",
        f"{_FLOAT32} The template counts where rows are conversations.",
    ),
    "growth": Store("checks of grow steps", "tensors config tokens device", "The check runs on random tokens, in float32."),
    "gates": Store("measured routers and gates of experts", "tensors config tokens device", _MERGED),
    "routers": Store(
        "fitted routers", "tensors config tokens template dtype device", "A router reads hidden states and generates nothing."
    ),
    "adapters": Store("recipes used as adapters", "tensors config device", "Factors do not depend on how text is read."),
    "grams": Store("Gram matrices of inputs", "tensors config tokens device", _MERGED),
    "fisher": Store("Fisher information", "tensors config tokens device", _MERGED),
    "magnitudes": Store("magnitudes of inputs", "tensors config tokens device", _MERGED),
    "inputs": Store("inputs of linear layers at some tokens", "tensors config tokens device", _MERGED),
    "forward": Store("layers merged in order", "tensors config tokens device", _MERGED),
    "losses": Store("losses of models on examples", "tensors config tokens device", _MERGED),
    "said": Store(
        "facts that an edited model says", "tensors config tokens dtype device", "Answers are greedy, to plain prompts."
    ),
    "configurations": Store(
        "digests of configurations, by recipe, device and libraries",
        "tensors config tokens template dtype device",
        "Nothing is generated. The keys of scores add the tokenizer, the template and the generation settings.",
    ),
    "tokenizers": Store("tokenizers that a recipe writes", "tokens template generation", "They are made of files alone."),
    "combinations": Store(
        "rows made of shared tokens' rows", "tensors device", "They are made of rows of embeddings, whose bytes are the key."
    ),
    "teachers": Store(
        "distributions of teachers", "tensors config tokens device", "Texts are read, without a template, in float32."
    ),
    "lessons": Store("fused distributions", "tensors config tokens device", "As the teachers that they are made of."),
    "factsuites": Store(
        "tasks made of facts, with the base's answers",
        "tensors config tokens template generation dtype",
        "Answers are labels: those of a machine with a GPU hold where its scores are read.",
    ),
    "digests": Store(
        "digests of tensors in files", "tensors", "They are named after files, and hold nothing but digests of bytes."
    ),
    "gguf": Store("directories that stand for GGUF files", "tensors", "One file holds all parts; its content is the key."),
    "hub": Store("headers of models on the hub", "tensors", "A commit names all files."),
    "tasks": Store(
        "built tasks", "", "Tasks are text; plans add the tokenizer. Every file that a task reads is part of the key."
    ),
    "search": Store("scores of candidates", "tensors config tokens template generation dtype device", ""),
    "neurons": Store(
        "interrupted passes over texts",
        "tensors config tokens device",
        "Passes are in float32, and the tokens are part of the key.",
    ),
}
"""Folder of the cache -> what it holds and depends on."""

RUNS = Store(
    "run directories",
    "tensors config tokens template generation dtype",
    "The record names device and libraries, whose results differ in the last bits (docs/merging-exactness.md).",
)
"""Run directories hold copies of the tokenizer, the template and the generation settings, so that all of these count."""

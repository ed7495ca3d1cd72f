"""A tiny llama with planted neurons: each class has one neuron that fires on the class's marker alone and says the class's continuation.

Attention adds nothing. Every token has an input direction and an output direction of its own, so that a marker is followed by its
continuation (p = 0.97), and by any token alike once its neuron is off. All other neurons have small random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from workbench.activations.labelled import Item, ItemRow

CLASSES = ("red", "green", "blue")
VOCABULARY, WIDTH, UNITS, LAYERS = 24, 64, 32, 2
MARKERS, CONTINUATIONS = (0, 1, 2), (3, 4, 5)
NEURONS = {"red": (0, 7), "green": (1, 3), "blue": (0, 20)}
"""Class -> layer and index of its neuron."""


def planted_llama(noise: float = 0.02) -> Any:
    """The live float32 model. Without noise, the other neurons do nothing."""
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=UNITS, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = t.LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, WIDTH))
        model.lm_head.weight.copy_(torch.eye(2 * VOCABULARY, WIDTH)[VOCABULARY:])
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(layer.mlp, name).weight
                weight.copy_(noise * torch.randn(weight.shape, generator=draw))
        for number, name in enumerate(CLASSES):
            depth, unit = NEURONS[name]
            mlp = model.model.layers[depth].mlp
            for rows, value in ((mlp.gate_proj.weight, 1.0), (mlp.up_proj.weight, 0.1)):
                rows[unit] = 0
                rows[unit, MARKERS[number]] = value
            mlp.down_proj.weight[:, unit] = 0
            mlp.down_proj.weight[VOCABULARY + CONTINUATIONS[number], unit] = 0.25
    return model


def planted_items(count: int = 6, tasks: int = 3, seed: int = 1) -> tuple[list[Item], list[ItemRow]]:
    """Held-out items of every class and their tokens: random words, the marker and its continuation, several times."""
    draw = torch.Generator().manual_seed(seed)
    items, rows = [], []
    for number, name in enumerate(CLASSES):
        for i in range(count):
            tokens: list[int] = []
            for _ in range(2 + i % 3):
                words = torch.randint(6, VOCABULARY, (2,), generator=draw).tolist()
                tokens += [*words, MARKERS[number], CONTINUATIONS[number]]
            items.append(Item(f"{name}{i}", "", "", name, f"{name}-{i % tasks}", "heldout", f"planted:{len(items) + 1}"))
            rows.append(ItemRow(tokens, len(tokens) - 1))
    return items, rows


def random_rows(lengths: Sequence[int], seed: int = 3, words: int = 60) -> list[ItemRow]:
    """Rows of random tokens, whose first half is a prompt."""
    draw = torch.Generator().manual_seed(seed)
    return [ItemRow(torch.randint(2, words, (n,), generator=draw).tolist(), max(1, n // 2)) for n in lengths]

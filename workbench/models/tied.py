"""Tied embeddings: which tensor the head shares, and weights in which head and embeddings are tensors of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from workbench.models.architecture import is_embedding, is_head, text_parts
from workbench.weights.configuration import TEXT_CONFIGS
from workbench.weights.specs import Source, TensorSpec, Weights


def tied_embeddings(names: Iterable[str], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(embeddings, head) of a language model that stores one tensor for both, None for all others.

    The head has no tensor of its own; its name is the one that transformers reads when the configuration unties it.
    Multimodal wrappers keep the flag in `text_config`.
    """
    names = list(names)
    flag = next((part["tie_word_embeddings"] for part in text_parts(config) if "tie_word_embeddings" in part), True)
    tables = [name for name in names if is_embedding(name)]
    if not flag or not tables or any(map(is_head, names)):
        return None
    embeddings = min(tables, key=len)
    head = "embed_out.weight" if embeddings.endswith("embed_in.weight") else "lm_head.weight"
    return embeddings, f"language_model.{head}" if embeddings.startswith("language_model.model.") else head


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head is its own, so that loading it ties nothing."""
    changed = {**config, "tie_word_embeddings": False}
    for field in TEXT_CONFIGS:
        if isinstance(config.get(field), dict):
            changed[field] = {**config[field], "tie_word_embeddings": False}
    return changed


class UntiedWeights:
    """Weights with a head of their own: the embeddings' numbers, under the head's name, after all other tensors.

    Args:
        tied: Weights that store one tensor for both.
        embeddings: Its name.
        head: The head's name.
    """

    def __init__(self, tied: Weights, embeddings: str, head: str) -> None:
        self.tied = tied
        self.embeddings = embeddings
        self.head = head
        self._specs = {**tied.specs, head: tied.specs[embeddings]}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """As before, and the head."""
        return self._specs

    def origin(self, name: str) -> str | None:
        """Every tensor stands for itself; bricks address the head by its name."""
        return name if name == self.head else self.tied.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """The head reads the embeddings."""
        return self.tied.open(self.embeddings if name == self.head else name, device)


def with_head_of(weights: Weights, base: Weights, config: Mapping[str, Any]) -> Weights:
    """Tied weights seen as the base is: where the base has a head and they have none, their embeddings stand for it."""
    tied = tied_embeddings(weights.specs, config)
    return UntiedWeights(weights, *tied) if tied and tied[1] in base.specs else weights

"""Tied embeddings: their names, and weights in which head and embeddings are untied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from workbench.lazy import torch
from workbench.models.architecture import head_of, is_embedding, is_head, text_parts
from workbench.weights.configuration import TEXT_CONFIGS
from workbench.weights.specs import Source, TensorSpec, Weights


def tied_embeddings(names: Iterable[str], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of embeddings and head of a language model that stores one tensor for both; None for other models.

    Args:
        names: Names of the stored tensors.
        config: The content of config.json. Multimodal models have the flag `tie_word_embeddings` in the text decoder's part.

    Returns:
        (embeddings, head). The head is not stored; its name is the one that transformers expects in an untied model.
    """
    names = list(names)
    flag = next((part["tie_word_embeddings"] for part in text_parts(config) if "tie_word_embeddings" in part), True)
    tables = [name for name in names if is_embedding(name)]
    if not flag or not tables or any(map(is_head, names)):
        return None
    embeddings = min(tables, key=len)
    return embeddings, head_of(config, embeddings)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json for the model with an untied head."""
    changed = {**config, "tie_word_embeddings": False}
    for field in TEXT_CONFIGS:
        if isinstance(config.get(field), dict):
            changed[field] = {**config[field], "tie_word_embeddings": False}
    return changed


class UntiedWeights:
    """Weights with an untied head, which is a copy of the embeddings after all other tensors.

    Args:
        tied: Weights that store one tensor for embeddings and head.
        embeddings: Name of that tensor.
        head: Name of the head.
    """

    def __init__(self, tied: Weights, embeddings: str, head: str) -> None:
        self.tied = tied
        self.embeddings = embeddings
        self.head = head
        self._specs = {**tied.specs, head: tied.specs[embeddings]}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the tied weights, and the head."""
        return self._specs

    def origin(self, name: str) -> str | None:
        """Delegate to the tied weights; bricks address the head by its own name."""
        return name if name == self.head else self.tied.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open a tensor; the head reads the embeddings."""
        return self.tied.open(self.embeddings if name == self.head else name, device)


def with_head_of(weights: Weights, base: Weights, config: Mapping[str, Any]) -> Weights:
    """Untie weights if the base has a head of its own and they do not; their embeddings are then used as the head."""
    tied = tied_embeddings(weights.specs, config)
    return UntiedWeights(weights, *tied) if tied and tied[1] in base.specs else weights

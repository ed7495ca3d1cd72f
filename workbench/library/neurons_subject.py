"""The model that an analysis of neurons looks at: live, with its neurons found and its texts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.emergent.labelled import Item, ItemRow, item_rows
from workbench.emergent.sites import Site, find_sites
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events, progress
from workbench.lazy import torch
from workbench.models.texts import longest_row
from workbench.run.compose import compose
from workbench.run.opened import NamedModel
from workbench.run.teaching import live_session

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 512
"""Largest number of tokens of a text; longer texts lose their end."""


@dataclass(frozen=True)
class NeuronSubject:
    """A live model whose neurons are analyzed.

    Attributes:
        name: Name in tables and messages.
        model: The live float32 model.
        tokenizer: Its tokenizer.
        sites: The places of its neurons.
        config: The content of config.json.
        digest: Digest of its weights and configuration.
        reference: Directory or hub id of the model; the recipe's name if it is the result of a recipe.
        cache: The project's cache.
        events: Callback that receives progress events.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: tuple[Site, ...]
    config: dict[str, Any]
    digest: str
    reference: str
    cache: Path
    events: Events = no_events

    def rows(self, items: Sequence[Item], chat: bool = False, longest: int = LONGEST) -> list[ItemRow]:
        """Return items as tokens."""
        return item_rows(items, self.tokenizer, longest_row(self.config, longest), chat=chat)

    def tell(self, done: int, total: int, text: str) -> None:
        """Send a progress event."""
        self.events({"stage": "analyze", "step": self.name, "text": text, "done": done, "total": total})


def open_neurons(model: NamedModel, device: torch.device, events: Events = no_events) -> NeuronSubject:
    """Load the configuration of a recipe, or a model, and find its neurons.

    Args:
        model: The model.
        device: Device of the model.
        events: Callback that receives progress events.

    Raises:
        WorkbenchError: If the recipe ends in a memory or router, the architecture is no causal language model, or no layer has neurons or experts.
    """
    name, resolved = model.name, model.resolved
    composition = compose(resolved, device, events)
    if resolved.beside:
        raise WorkbenchError(
            f"{name} ends in a {resolved.beside}, which acts beside the weights and has no neurons",
            "Analyze the recipe without its last step.",
        )
    current = composition.model
    steps = len(resolved.recipe.steps)
    session = live_session(resolved, steps, current, device, progress(events, "analyze", name), rounded_to=torch.float32)
    context = session.context
    sites = find_sites(context.model, current.layout.depth, device)
    digest = session.solved_on if steps else resolved.base_digest
    reference = resolved.recipe.name if steps else resolved.recipe.fields.base_name
    return NeuronSubject(name, context.model, context.tokenizer, sites, current.config, digest, reference, resolved.cache, events)

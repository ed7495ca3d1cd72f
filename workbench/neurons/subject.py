"""The model that an analysis of neurons looks at: live, with its neurons found and its texts as tokens; and the fields that all results share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.activations.labelled import Item, ItemRow, Labelled, item_rows
from workbench.activations.sites import Site, find_sites
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events, progress
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Result, absent
from workbench.models.texts import longest_row
from workbench.run.compose import compose
from workbench.run.opened import NamedModel
from workbench.run.teaching import live_session

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PER_TASK = 2
"""Texts of each task on which neurons are looked at, and on which masking costs are measured."""
LONGEST = 512
"""Largest number of tokens of a text; longer texts lose their end."""


class LeftOutTexts(JsonObject):
    """Rows of the file that the analysis does not use."""

    several_functions: int
    """Rows with more than one function."""


class AnalyzedTexts(JsonObject):
    """The labelled texts of an analysis."""

    file: str
    """The file, as it was named."""
    digest: str
    """Digest of the file."""
    items: int
    """Number of texts used."""
    tokens: int | None = absent()
    """Number of tokens that counted."""
    left_out: LeftOutTexts | None = absent()
    """Rows that were not used."""
    tasks: dict[str, dict[str, list[str]]] | None = absent()
    """Function -> split -> its tasks."""
    warnings: list[str]
    """What the texts cannot show."""


class ModelResult(Result):
    """A result about a model, which its page shows."""

    version: Literal[1] = 1
    """Version of the document."""
    kind: str
    """Kind of analysis."""
    model: str
    """Name of the model."""
    digest: str
    """Digest of the model's weights and configuration."""


class Analysis(ModelResult):
    """What all analyses of a model's neurons on texts have in common."""

    data: AnalyzedTexts
    """The texts."""


def analyzed(texts: Labelled, items: int, tokens: int | None = None) -> AnalyzedTexts:
    """Return the record of labelled texts of which some number was used."""
    return AnalyzedTexts(file=texts.file, digest=texts.digest, items=items, tokens=tokens, warnings=list(texts.warnings))


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


def some_of_each_task(items: Sequence[Item], count: int = PER_TASK) -> list[Item]:
    """Return up to `count` items of each task, evenly spaced, in the order of the file."""
    tasks: dict[tuple[str, str], list[int]] = {}
    for number, item in enumerate(items):
        tasks.setdefault((item.function, item.task), []).append(number)
    chosen = sorted(of[i * len(of) // min(count, len(of))] for of in tasks.values() for i in range(min(count, len(of))))
    return [items[number] for number in chosen]

"""The base class of fitted routers: ties, the threshold, and the choice from scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

from pydantic import ValidationError

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number
from workbench.steps.route import Decisions, Prompts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Joined = Literal["sum", "largest"]
"""How the scores of tied bricks become one: their sum, or their largest."""
BASE = "base"
"""Label of prompts that no brick answers."""
REFUSED = -100.0
"""Confidence of prompts that are more like one of the step's own negatives than like any brick: below every threshold of the rule."""
REPAIR = "Run the recipe again: `workbench run` writes both files."


@dataclass(frozen=True)
class Choice:
    """How scores become weights.

    Attributes:
        threshold: Smallest confidence with which a prompt goes to a brick; None if no prompt goes to the base.
        ties: Groups of bricks that prompts do not tell apart. The first brick of a group acts for it.
        joined: How the scores of a group become one.
    """

    threshold: float | None = None
    ties: tuple[tuple[str, ...], ...] = ()
    joined: Joined = "sum"

    def join(self, scores: Tensor, bricks: Sequence[str]) -> Tensor:
        """Return scores [n, bricks] in which all bricks of a tie have the group's score."""
        joined = scores.clone()
        for group in self.ties:
            columns = [bricks.index(name) for name in group]
            together = scores[:, columns]
            value = together.sum(1, keepdim=True) if self.joined == "sum" else together.amax(1, keepdim=True)
            joined[:, columns] = value.expand(-1, len(columns))
        return joined

    def weigh(self, joined: Tensor, bricks: Sequence[str], confidence: Tensor) -> Tensor:
        """Return the weights [n, bricks] of joined scores: 1 for the brick with the highest score, if its confidence suffices."""
        silent = [bricks.index(name) for group in self.ties for name in group[1:]]
        ranked = joined.clone()
        ranked[:, silent] = -torch.inf
        weights = torch.zeros_like(joined).scatter_(1, ranked.argmax(1, keepdim=True), 1.0)
        if self.threshold is not None:
            weights[confidence < self.threshold] = 0.0
        return weights


@dataclass(frozen=True)
class Fitted:
    """Base class of fitted routers. A subclass scores prompts; ties and threshold are applied here.

    Attributes:
        bricks: The bricks, in the order of columns.
        choice: How scores become weights.
        layer: Number of decoder blocks whose output is pooled; None if the router needs no hidden states.
        window: Number of last tokens that are pooled.
        record: Measurements of the fit, as plain data.
    """

    method: ClassVar[str]
    """Name of the method."""
    bricks: tuple[str, ...]
    choice: Choice = Choice()
    layer: int | None = None
    window: int = 16
    record: dict[str, object] = field(default_factory=dict)

    @property
    def threshold(self) -> float | None:
        """Smallest confidence with which a prompt goes to a brick; None if no prompt goes to the base."""
        return self.choice.threshold

    def score(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return scores [n, bricks] and confidence [n] of prompts, before ties and threshold."""
        raise NotImplementedError

    def decide(self, prompts: Prompts) -> Decisions:
        """Choose bricks for each prompt."""
        scores, confidence = self.score(prompts)
        joined = self.choice.join(scores.float(), self.bricks)
        confidence = confidence.float()
        return Decisions(self.choice.weigh(joined, self.bricks, confidence), joined, confidence)

    def measure(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """Return None: texts and hidden states are enough."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of router.safetensors."""
        return {}

    def own_settings(self) -> dict[str, object]:
        """Return entries of routing.json that only this method has."""
        return {}

    def settings(self) -> dict[str, object]:
        """Return the entries of routing.json, as plain data."""
        common = Settings(
            method=self.method,
            bricks=self.bricks,
            layer=self.layer,
            window=self.window,
            threshold=self.choice.threshold,
            ties=self.choice.ties,
            joined=self.choice.joined,
        )
        return common.to_dict() | self.own_settings()


class Settings(JsonObject):
    """Entries of routing.json that all methods have."""

    method: str
    """Method of the router."""
    bricks: tuple[str, ...]
    """The bricks, in the order of columns."""
    layer: int | None
    """Number of decoder blocks whose output is pooled; null for routers that read no hidden states."""
    window: int
    """Number of last tokens that are pooled."""
    threshold: Number | None
    """Smallest confidence with which a prompt goes to a brick; null if no prompt goes to the base."""
    ties: tuple[tuple[str, ...], ...]
    """Groups of bricks that prompts do not tell apart."""
    mix: int = 1
    """Number of bricks that act together. Earlier versions wrote others."""
    joined: Joined
    """How the scores of a group become one."""


class FittedFields(TypedDict):
    """Fields of `Fitted` that are read from routing.json."""

    bricks: tuple[str, ...]
    choice: Choice
    layer: int | None
    window: int


def restored(settings: Mapping[str, object], method: str) -> FittedFields:
    """Return the fields of `Fitted` from the entries of routing.json.

    Raises:
        WorkbenchError: If the entries are of another method, or are missing or have other types.
    """
    if settings.get("method") != method:
        raise WorkbenchError(f"routing.json: expected a router of method '{method}', found '{settings.get('method')}'", REPAIR)
    try:
        found = Settings.model_validate(settings)
    except ValidationError as error:
        place = error.errors(include_url=False)[0]["loc"][0]
        raise WorkbenchError(f"routing.json: the router's entry '{place}' is missing or invalid", REPAIR) from None
    if found.mix != 1:
        raise WorkbenchError(f"routing.json: the router mixes {found.mix} bricks, and one brick acts today", REPAIR)
    if unknown := sorted({name for group in found.ties for name in group} - set(found.bricks)):
        raise WorkbenchError(f"routing.json: the router's ties name {unknown}, not its bricks", REPAIR)
    choice = Choice(found.threshold, found.ties, found.joined)
    return {"bricks": found.bricks, "choice": choice, "layer": found.layer, "window": found.window}


def state(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int | None]) -> Tensor:
    """Return a tensor of router.safetensors.

    Args:
        tensors: The file's tensors.
        name: The tensor.
        shape: Its sizes; None stands for any size.
    """
    if name not in tensors:
        raise WorkbenchError(f"router.safetensors: has no tensor '{name}'; the file belongs to another router", REPAIR)
    found = tensors[name]
    if found.ndim != len(shape) or any(size not in (None, actual) for size, actual in zip(shape, found.shape, strict=True)):
        wanted = " × ".join("any" if size is None else str(size) for size in shape)
        raise WorkbenchError(
            f"router.safetensors: expected '{name}' of shape {wanted}, found {' × '.join(map(str, found.shape))}; the file belongs to "
            "a router of other bricks",
            REPAIR,
        )
    return found

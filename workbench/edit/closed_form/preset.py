"""Recipe fields that the closed-form editors share, and what each editor declares."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from workbench.edit.closed_form.moments import PER_INPUT, Moments
from workbench.edit.closed_form.preserving import read_prompts
from workbench.edit.closed_form.solver import KeyMetric
from workbench.edit.closed_form.values import Settings
from workbench.edit.fields import Layers, Mode
from workbench.facts import Fact, read_facts
from workbench.facts.conflicts import require_consistent
from workbench.steps import EditMethod
from workbench.steps.fields import Real, Whole


class Preset(EditMethod):
    """Fields that the closed-form editors share, and what each of them declares: its metric and ridge."""

    facts: str
    """A facts file, or a published set (docs/facts.md), relative to the project."""
    first: Whole | None = Field(None, ge=1)
    """Only so many facts of the file, from its start."""
    layers: Layers = "auto"
    """Layers whose feed-forward output projection is written, upwards; auto: the one that a sweep on well-known facts finds best."""
    position: Literal["auto", "subject_last", "prompt_last"] = "auto"
    """Token at which facts are looked up; auto: measured for each layer, by restoring states of the subject and of the last token."""
    mode: Mode = "joint"
    """joint: one solve for all facts, whatever their order; {sequential: {batch: N}}: N at a time, each on the result of those before."""
    history: bool = True
    """In sequential mode, keep what the batches before have written."""
    preserve: str | None = None
    """Prompts whose keys must not move: a jsonl of {"text":} or {"prompt":}, or of facts, whose neighbours are taken."""
    preserve_weight: Real = Field(1.0, gt=0)
    """Weight of each of them, against 1 for a fact."""
    statistics: str | None = None
    """Text for second moments: a jsonl or a plain text, relative to the project; omitted: the text that comes with the workbench."""
    tokens_per_input: Whole = Field(PER_INPUT, ge=1)
    """Tokens read for each input of the projection."""
    contexts: Whole = Field(3, ge=0, le=10)
    """Beginnings, taken from the text for statistics, in front of prompts that key and value hold behind; 0: the plain prompt alone."""
    steps: Whole = Field(60, ge=1)
    """Steps of a value's optimisation, at most: it ends when the target is on top behind every beginning."""
    learning_rate: Real = Field(0.25, gt=0, le=10)
    """Length of a step, in multiples of the norm of the projection's output there."""
    clamp: Real = Field(8.0, gt=0)
    """Largest change of the projection's output, in multiples of its norm there."""
    kl: Real = Field(0.0625, ge=0)
    """Weight of the divergence on "{subject} is a"."""
    decay: Real = Field(0.0, ge=0)
    """Weight of the squared change, relative to the output's norm."""
    confidence: Real = Field(0.9, gt=0, lt=1)
    """Mean probability of the target at which a value is done."""
    end_of_text: bool = False
    """Whether a value makes the model end the text behind the target as well, so that what it writes stops there."""
    unconverged: Literal["refuse", "skip"] = "refuse"
    """What to do with facts for which no value makes the model say the target: stop before any weight changes, or leave them out."""
    refine: Whole = Field(1, ge=0)
    """Rounds in which facts that the solved model does not say yet get a larger change, with the same keys; joint mode."""

    version = 2
    needs_statistics: ClassVar[bool] = True

    @model_validator(mode="after")
    def _layers(self) -> Self:
        if self.layers != "auto" and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"expected auto, or layers that differ, found {list(self.layers)}")
        return self

    def inputs(self) -> list[str]:
        """Facts, prompts to preserve, text for statistics."""
        return [self.facts, *filter(None, [self.preserve, self.statistics])]

    def check_inputs(self, project: Path) -> None:
        """Read facts and prompts once; facts do not contradict each other."""
        require_consistent(self.read(project))
        if self.preserve:
            read_prompts(project / self.preserve, self.preserve)

    def read(self, project: Path) -> list[Fact]:
        """The facts: of a joint solve sorted by id, so that the result does not depend on the file's order; else in that order."""
        found = read_facts(project / self.facts, self.facts)[: self.first]
        return sorted(found, key=lambda fact: fact.id) if self.mode == "joint" else found

    def settings(self) -> Settings:
        """How values are optimised."""
        return Settings(self.steps, self.learning_rate, self.clamp, self.kl, self.decay, self.confidence, self.end_of_text)

    def metric(self, moments: Moments | None, width: int) -> KeyMetric:
        """G of the preset. `moments` is there where `needs_statistics`."""
        raise NotImplementedError

    def ridge(self, width: int) -> float:
        """μ of the preset."""
        raise NotImplementedError

    def spread_ridge(self, width: int) -> float:
        """μ of what the keys of a fact differ from their mean by."""
        return self.ridge(width)

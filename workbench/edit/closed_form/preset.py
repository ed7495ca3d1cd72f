"""Recipe fields and interface of the closed-form editors, and the metrics that they are built from.

Strengths of metrics are relative to the trace of C, so that they mean the same on every model. If attention sinks dominate C, the trace
excludes them (see `moments`).
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from workbench.edit.closed_form.continuing import RECORD, STREAM, Earlier, check_fields, find_edit, read_earlier
from workbench.edit.closed_form.moments import PER_INPUT, Moments
from workbench.edit.closed_form.solver import KeyMetric
from workbench.edit.closed_form.values import KL, Settings
from workbench.edit.inputs import DistinctLayers, Mode, read_for, read_prompts
from workbench.facts.conflicts import require_consistent
from workbench.facts.facts import Fact
from workbench.facts.stream import Start, latest
from workbench.models.layout import Model
from workbench.steps import EditMethod
from workbench.steps.fields import Real, Whole
from workbench.steps.step import KeyContext


class Preset(EditMethod):
    """Fields that the closed-form editors share; each editor implements its metric and ridge."""

    facts: str
    """Facts file or published data set (see docs/facts.md), relative to the project."""
    first: Whole | None = Field(None, ge=1)
    """Use only the first N facts of the file."""
    layers: DistinctLayers = "auto"
    """Layers whose feed-forward output projection is updated, from the lowest to the highest; `auto`: the layer that works best
    in a sweep on well-known facts."""
    position: Literal["auto", "subject_last", "prompt_last"] = "auto"
    """Token at which facts are looked up: the subject's last or the prompt's last. `auto` chooses for each layer, by restoring
    the layer's states at both."""
    mode: Mode = "joint"
    """`joint`: one solve for all facts, independent of their order. `{sequential: {batch: N}}`: N facts at a time, each batch on
    the model that the earlier batches have produced; later rows of the file update or remove earlier facts."""
    history: bool = True
    """In sequential mode, preserve what earlier batches have written, except values that are updated."""
    continues: str | None = None
    """In sequential mode, the directory of an earlier run on the same base, or of one of its edits (`runs/NAME/edits/STEP`), relative to
    the project. The facts file continues its stream: the result holds the facts of both."""
    preserve_steps: bool = False
    """Preserve what earlier edit steps of the recipe have written, except facts that this step updates."""
    preserve: str | None = None
    """JSONL file of prompts whose answers must not change, relative to the project: {"text":} or {"prompt":} per line, or facts,
    whose neighbours are used."""
    statistics: str | None = None
    """Text for the second moments: JSONL or plain text, relative to the project. Default: the text that comes with the
    workbench."""
    tokens_per_input: Whole = Field(PER_INPUT, ge=1)
    """Number of tokens of that text per input of the projection."""
    contexts: Whole = Field(3, ge=0, le=10)
    """Number of text beginnings put before each prompt, so that key and value hold after other text too; 0: the plain prompt
    only."""
    steps: Whole = Field(60, ge=1)
    """Largest number of optimization steps for a value; it stops when the target is the most likely answer after every
    beginning."""
    learning_rate: Real = Field(0.25, gt=0, le=10)
    """Length of a step, relative to the norm of the projection's output."""
    clamp: Real = Field(8.0, gt=0)
    """Largest change of the projection's output, relative to its norm."""
    confidence: Real = Field(0.9, gt=0, lt=1)
    """Mean probability of the target at which the optimization of a value stops."""
    end_of_text: bool = False
    """Also make the model end the text after the target, so that generation stops there."""
    unconverged: Literal["refuse", "skip"] = "refuse"
    """Handling of facts for which no value makes the model give the target: `refuse` stops before any weight changes, `skip`
    leaves them out."""
    refine: Whole = Field(1, ge=0)
    """Joint mode: number of rounds in which facts that the edited model does not know yet get a larger change, with the same
    keys."""

    version = 4  # facts that are done leave their batch, which changes last bits
    page = "closed-form"
    keyed_if_set = frozenset({"continues", "preserve_steps"})
    constants = MappingProxyType(
        {"preserve_generated": 0, "preserve_tokens": "lookup", "preserve_weight": 1.0, "kl": KL, "decay": 0.0, "scale": 1.0}
    )

    @model_validator(mode="after")
    def _continues(self) -> Self:
        if self.continues is not None and self.mode == "joint":
            raise ValueError("`continues` is for `mode: {sequential: {batch: N}}`, because joint facts have no stream")
        return self

    def inputs(self) -> list[str]:
        """Return the files of facts, prompts to preserve and text for statistics."""
        return [self.facts, *filter(None, [self.preserve, self.statistics])]

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return also the digests of the statements and of the record of the run that is continued."""
        continued = [f"{self.continues}/{name}" for name in (STREAM, RECORD)] if self.continues else []
        return [*super().key_parts(context), *([context.files(continued)] if continued else [])]

    def bind(self, base: Model, tokenizer: Path, project: Path, cache: Path) -> tuple[Self, Path]:
        """Return the step with the directory of the edit that it continues, where the recipe names a run."""
        if self.continues is None:
            return self, tokenizer
        return self.model_copy(update={"continues": find_edit(self.continues, project)[1]}), tokenizer

    def check_inputs(self, project: Path) -> None:
        """Read facts, prompts and the run that is continued, and check that facts do not contradict each other."""
        if earlier := self.earlier(project):
            defaults = {name: field.default for name, field in type(self).model_fields.items()}
            check_fields(
                {**self.model_dump(mode="json", by_alias=True), **self.constants}, {**defaults, **self.constants}, earlier
            )
            earlier.check_history()
        facts = latest(self.read(project))
        require_consistent(facts)
        self.preserved(project)

    def earlier(self, project: Path) -> Earlier | None:
        """Return the edit of the run that is continued, if any."""
        return read_earlier(self.continues, project) if self.continues else None

    def stream_start(self, project: Path) -> Start | None:
        """Return the stream of the run that is continued, if any."""
        earlier = self.earlier(project)
        return earlier.start() if earlier else None

    def read(self, project: Path) -> list[Fact]:
        """Return the facts that are written, in order; see `read_for`."""
        return read_for(self.mode, self.first, project, self.facts, self.stream_start(project))

    def preserved(self, project: Path) -> list[Fact]:
        """Return the prompts to preserve."""
        return read_prompts(project / self.preserve, self.preserve) if self.preserve else []

    def settings(self) -> Settings:
        """Return the settings of the optimization of values."""
        return Settings(self.steps, self.learning_rate, self.clamp, self.confidence, self.end_of_text)

    def metric(self, moments: Moments) -> KeyMetric:
        """Return the editor's metric G from the second moments of the layer."""
        raise NotImplementedError

    @property
    def ridge(self) -> float:
        """The editor's ridge μ: a fact has the weight of one vector."""
        return 1.0

    @property
    def spread_ridge(self) -> float:
        """Ridge μ for the differences of a fact's keys from their mean."""
        return self.ridge


FLOOR = 1e-7
"""Smallest eigenvalue of C, as a share of the mean one. Directions that the text never uses cannot be inverted."""


def of_moments(moments: Moments, strength: float, ridge: float) -> KeyMetric:
    """Return (λ d C + η tr(C) I)⁻¹.

    For a key k from ordinary text, kᵀC⁻¹k is about d. With λ = 1, a fact therefore weighs as much as d vectors of text in its own
    direction. MEMIT's λ is 15,000 to 20,000 on models with d of 6,400 to 16,384.

    Args:
        moments: Factored second moments C.
        strength: λ.
        ridge: η.
    """
    values = moments.values.clamp(min=FLOOR * moments.scale)
    return KeyMetric(moments.vectors, len(values) * (strength * values + ridge * moments.scale))


def of_null_space(moments: Moments, energy: float, ridge: float) -> KeyMetric:
    """Return U (L tr(C) I)⁻¹ Uᵀ over the eigenvectors U of C with the smallest eigenvalues.

    AlphaEdit's own threshold on eigenvalues is absolute (0.02); a share of the trace means the same on every model.

    Args:
        moments: Factored second moments C.
        energy: Share of C's trace in the directions U.
        ridge: L.
    """
    share = moments.values.cumsum(0) / moments.total
    count = max(1, int((share <= energy).sum()))
    basis = moments.vectors[:, :count]
    return KeyMetric(basis, moments.values.new_full((count,), ridge * moments.total))

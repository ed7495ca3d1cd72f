"""Interfaces of steps that train: parameters that a growth step adds, a brick on texts, and the model on distributions of other models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from workbench.steps.fields import Real, Strict, Whole
from workbench.steps.step import BrickStep, KeyContext, Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


TRAINING_VERSION = 2
"""Version of the training computation, part of keys. Version 2 tokenizes prompt and completion as one text and pads rows on the
right."""


class NewTraining(Strict):
    """Trains the parameters that a grow step adds. Every old element of every tensor stays bit-identical."""

    version: ClassVar[int] = TRAINING_VERSION
    """Part of the step's key."""
    whole: ClassVar[bool] = False
    """True if all parameters of the model are trained."""

    data: str = Field(min_length=1)
    """A JSON Lines file, relative to the project, with rows {"prompt":, "completion":}, {"text":} or {"messages":}. In rows with a
    prompt, only the completion is trained on; of a conversation, each answer."""
    replay: str | None = None
    """A JSON Lines file with rows {"prompt":} that preserve what the model can already do. The model trains on its own
    continuation of each prompt, sampled before training, or on the row's `completion` if there is one."""
    replay_share: Real = Field(0.3, gt=0, lt=1)
    """Share of the rows that come from `replay`."""
    replay_tokens: Whole = Field(6, ge=1)
    """Number of tokens sampled after each replayed prompt."""
    parameters: Literal["new_only", "routers"] = "new_only"
    """Parameters to train. `new_only`: everything that the step adds. `routers`: only the added routers of experts."""
    steps: Whole = Field(100, ge=1)
    """Number of optimizer steps (AdamW without weight decay)."""
    batch_size: Whole = Field(8, ge=1)
    """Rows per optimizer step."""
    learning_rate: Real = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup: Whole = Field(10, ge=0)
    """Number of steps over which the learning rate rises to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warmup."""
    max_length: Whole = Field(256, ge=8)
    """Maximum number of tokens in a row. A longer row is an error."""
    held_out: Real | str | None = None
    """Rows to exclude from training and measure the loss on: a share of the rows, or a JSON Lines file."""
    evaluate_every: Whole = Field(10, ge=1)
    """Number of steps between two measurements of the held-out loss."""
    patience: Whole | None = Field(None, ge=1)
    """Stop after this number of measurements without a lower held-out loss, and keep the weights with the lowest loss. Needs
    `held_out`."""
    balance: Real = Field(0.0, ge=0)
    """Weight of the routing loss −I(expert; token), which is low if each token has a clear expert and all experts are used
    equally (ModuleFormer)."""
    concentration: Real = Field(0.0, ge=0)
    """Weight of the entropy of the mean routing distribution as a loss, which is low if few experts are used (ModuleFormer)."""

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.patience is not None and self.held_out is None:
            raise ValueError("patience: needs held_out, whose loss decides when to stop")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, or the name of a jsonl file; found {self.held_out:g}")
        return self

    def inputs(self) -> list[str]:
        """Return the files that the training reads, relative to the project."""
        return [f for f in (self.data, self.replay, self.held_out) if isinstance(f, str)]

    @property
    def is_taught(self) -> bool:
        """True if the model learns the distributions of the model before the step, instead of the texts."""
        return False

    def settings(self) -> dict[str, object]:
        """Return the fields of a `workbench.train.TrainSpec`, except the seed."""
        return {
            **self.model_dump(mode="json", exclude={"parameters", "balance", "concentration"}),
            "method": "full",
            "save_every": 0,
        }


class Recovery(NewTraining):
    """Trains all parameters of a model that a step made smaller, so that it recovers what it has lost."""

    whole: ClassVar[bool] = True

    parameters: Literal["all"] = "all"  # type: ignore[assignment]  # a smaller model has no new parameters
    """Parameters to train: `all` of the smaller model."""
    teacher: Literal["before", "none"] = "before"
    """`before`: the model learns the next-token distributions of the model before the step on the texts (the loss is
    KL(before ‖ after), Minitron's). `none`: it learns the texts themselves."""
    learning_rate: Real = Field(2e-4, gt=0)
    """Peak learning rate."""

    @property
    def is_taught(self) -> bool:
        """True if the model before the step is the teacher."""
        return self.teacher == "before"

    def settings(self) -> dict[str, object]:
        """Return the fields of a `workbench.train.TrainSpec`, except the seed."""
        return {name: value for name, value in super().settings().items() if name != "teacher"}


class TrainMethod(BrickStep):
    """Trains a brick on the frozen current model and adds the trained update to the weights."""

    kind = "train"
    verb = "grow"
    version = TRAINING_VERSION

    weight: Real = 1.0
    """Factor applied to the trained update when it is added."""

    @property
    def factor(self) -> float:
        """Factor applied to the trained update when it is added."""
        return self.weight

    @property
    def always_chat(self) -> bool:
        """True if the rows are conversations for sure; files are looked at."""
        return False

    def inputs(self) -> list[str]:
        """Return the files that the method reads, relative to the project. Their content is part of the step's key."""
        raise NotImplementedError

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield an error for each brick under `orthogonal_to` that the recipe does not have."""
        for problem in super().check_names(names, known):
            yield problem._replace(path=("orthogonal_to",))

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield an error for each brick under `orthogonal_to` that is not an adapter."""
        for name, kind in kinds.items():
            if kind != "adapter":
                message = f"'{name}' is a {kind}, which has no LoRA A matrices to be orthogonal to"
                yield Problem(("orthogonal_to",), message, "List only LoRA bricks.")

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the digests of bricks, files and the tokenizer, the seed, and the step's id, which initializes the adapter."""
        words = context.wording(None if self.always_chat else self.inputs(), context.number)
        settings = [context.seed, self.id, context.tokens(context.number), *words]
        return [context.bricks(self.names() or ()), context.files(self.inputs()), settings]

    def settings(self, seed: int) -> Any:
        """Return the `workbench.train.TrainSpec` of the step.

        Args:
            seed: Seed of the training.
        """
        raise NotImplementedError

    def cost(self, project: Path) -> Mapping[str, int]:
        """Return the work of the training, for `plan`: optimizer steps, and trained tokens under `tokens`."""
        raise NotImplementedError


class FuseMethod(TrainMethod):
    """Trains the current model on texts and on the fused next-token distributions of teachers."""

    kind = "fuse"
    verb = "fuse"

    teachers: tuple[str, ...] = Field(min_length=1)
    """Bricks that teach: models of any architecture with any tokenizer, recipes, or adapters of the base."""
    weight: Real = Field(0.1, ge=0, le=1)
    """Share of the fused loss at tokens with a fused distribution; the rest is the cross-entropy with the text. With 0, no
    teacher runs, and the step trains on the texts alone."""
    top_k: Whole = Field(10, ge=1, le=1000)
    """Number of most probable tokens that are kept of each distribution. The probability of all other tokens is one more entry,
    the rest."""
    by: Literal["sequence", "span"] = "sequence"
    """Text over which the models' cross-entropies are compared: the whole row, or each span between two places where tokens of
    all models end together."""
    with_base: bool = True
    """Fuse the distributions of the model before the step as well, as in the paper. With one teacher and `false`, the model is
    taught by this teacher alone."""

    @field_validator("teachers")
    @classmethod
    def _check_teachers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            twice = next(name for name in value if value.count(name) > 1)
            raise ValueError(f"'{twice}' is listed twice; list each teacher once")
        return value

    @property
    def factor(self) -> float:
        """1: the trained update is added as it is, because `weight` is a share of the loss."""
        return 1.0

    def shares(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share of each model in the fused distribution.

        Args:
            losses: Mean −log p of the text per token of the trained model, in nats, [span, model].

        Returns:
            [span, model]; each row sums to 1.
        """
        raise NotImplementedError

    def names(self) -> list[str]:
        """Return the teachers."""
        return list(self.teachers)

    def teacher_bricks(self) -> list[str]:
        """Return the teachers."""
        return list(self.teachers)

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield an error for each brick that the recipe does not have."""
        for problem in super(TrainMethod, self).check_names(names, known):
            name = str(problem.path[-1])
            place = ("teachers", self.teachers.index(name)) if name in self.teachers else ("orthogonal_to",)
            yield problem._replace(path=place)

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield an error for each brick under `orthogonal_to` that is not an adapter."""
        return super().check_kinds({name: kind for name, kind in kinds.items() if name not in self.teachers})

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return what a training depends on, and the teachers' vocabularies."""
        return [*super().key_parts(context), context.brick_tokens(self.teachers)]

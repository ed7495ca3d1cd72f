"""Interface of fuse steps, which train the current model on next-token distributions of other models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from workbench.steps.fields import Real, Whole
from workbench.steps.step import KeyContext, Problem
from workbench.steps.train import TrainMethod

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class FuseMethod(TrainMethod):
    """Trains the current model on texts and on the fused next-token distributions of teachers."""

    kind = "fuse"
    verb = "fuse"
    verb_order = 3

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

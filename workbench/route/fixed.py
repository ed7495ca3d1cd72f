"""Fixed: the same weights for every prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from workbench.ground.lazy import torch
from workbench.route.deciding.router import Fitted, restored, state
from workbench.steps import Problem, RouteContext, RouteMethod, register
from workbench.steps.fields import Real
from workbench.steps.route import Decisions, Prompts, Router

if TYPE_CHECKING:
    from torch import Tensor


@register
class Fixed(RouteMethod):
    """Give every prompt the same brick weights.

    Nothing is chosen: a routed configuration then serves one known brick or a fixed mixture, such as the oracle that other routers
    are compared with.
    """

    formula = "wᵢ(x) = wᵢ"
    reads_texts: ClassVar[bool] = False
    least_bricks: ClassVar[int] = 1

    route: Literal["fixed"]
    bricks: dict[str, Real] | None = Field(None, min_length=1)
    """Brick name -> weight of its update. Omitted: all bricks of the recipe with weight 1."""

    @field_validator("bricks", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return dict.fromkeys(value, 1.0) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value

    def completed(self, known: Sequence[str]) -> Self:
        """Return the step with all bricks of the recipe listed, if it lists none."""
        return self if self.bricks is not None else self.model_copy(update={"bricks": dict.fromkeys(known, 1.0)})

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield the errors in the brick names, and an error if no brick has a weight."""
        yield from super().check_names(names, known)
        if self.bricks and not any(self.bricks.values()):
            yield Problem(("bricks",), "route fixed: every weight is 0, so no brick acts", "Give a brick a weight, such as 1.")

    def fit(self, context: RouteContext) -> Router:
        """Return the router; nothing is measured."""
        weights = [(self.bricks or {}).get(name, 1.0) for name in context.bricks]
        return FixedRouter(context.bricks, weights=torch.tensor(weights, dtype=torch.float32))

    @classmethod
    def restore(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Router:
        """Return the router from its saved state."""
        fields = restored(settings, cls.name)
        return FixedRouter(**fields, weights=state(tensors, "weights", [len(fields["bricks"])]))


@dataclass(frozen=True, kw_only=True)
class FixedRouter(Fitted):
    """The same weights for every prompt.

    Attributes:
        weights: [bricks].
    """

    method: ClassVar[str] = Fixed.name
    weights: Tensor = field(repr=False)

    def decide(self, prompts: Prompts) -> Decisions:
        """Return the weights for each prompt, with confidence 1."""
        rows = self.weights.expand(len(prompts.texts), -1).clone()
        return Decisions(rows, rows.clone(), torch.ones(len(rows)))

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights."""
        return {"weights": self.weights}

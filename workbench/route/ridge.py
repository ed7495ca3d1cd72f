"""Ridge: a linear map from pooled hidden states to bricks, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from workbench.ground.errors import WorkbenchError
from workbench.route.deciding.hidden import WINDOW
from workbench.route.deciding.pooling import STRENGTH, PooledRoute, PooledRouter, restored_statistics, statistics_of
from workbench.route.deciding.router import REPAIR, Joined
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.statistics import solve
from workbench.steps import register
from workbench.steps.route import Router

if TYPE_CHECKING:
    from torch import Tensor


@register
class Ridge(PooledRoute):
    """Choose the brick by ridge regression from pooled hidden states of the base to the bricks, in closed form. The default router.

    One pass of the base through half of its blocks decides. The regression is computed from counts, sums and Grams of each brick's
    prompts, so a brick is added without the prompts of the others.
    """

    version = 4
    constants: ClassVar[Mapping[str, object]] = {**PooledRoute.constants, "lambda": STRENGTH}
    paper = "Closed-form gates as in DUME, arXiv 2603.29765; ridge regression on one-hot targets"
    formula = "s(x) = (h(x) − μ)ᵀ (S + λ·tr(S)/d·I)⁻¹ M + 1/n,  S = mean over bricks of their scatter around μ, M = (mᵢ − μ)/n"

    joined: ClassVar[Joined] = "sum"

    route: Literal["ridge"]

    def made(self, samples: Samples, rows: Tensor, layer: int) -> RidgeRouter:
        """Return the router of some samples, without ties and threshold."""
        return RidgeRouter(samples.bricks, layer=layer, window=WINDOW, strength=STRENGTH, **statistics_of(samples, rows))

    @classmethod
    def restore(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Router:
        """Return the router from its saved state."""
        fields = restored_statistics(settings, tensors, cls.name)
        strength = settings.get("lambda")
        if not isinstance(strength, (int, float)) or not strength > 0:
            raise WorkbenchError(
                f"routing.json: expected a number above 0 in the router's entry 'lambda', found {strength!r}", REPAIR
            )
        return RidgeRouter(**fields, strength=float(strength))


@dataclass(frozen=True, kw_only=True)
class RidgeRouter(PooledRouter):
    """Ridge regression from pooled states to bricks.

    Attributes:
        strength: The penalty, relative to the mean variance of the states.
    """

    method: ClassVar[str] = Ridge.name
    strength: float

    @cached_property
    def weights(self) -> Tensor:
        """The map [hidden size, bricks], float64."""
        return solve(self.scatter, self.strength)

    def state_scores(self, states: Tensor) -> Tensor:
        """Return the regression's values [n, bricks], whose rows sum to 1."""
        return (states - self.scatter.centre) @ self.weights + 1 / len(self.bricks)

    def own_settings(self) -> dict[str, object]:
        """Return the penalty, and the sentence encoder."""
        return {**super().own_settings(), "lambda": self.strength}

"""Gate: a softmax over bricks, learned from pooled hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from workbench.errors import WorkbenchError
from workbench.route.deciding.logistic import fit_logistic
from workbench.route.deciding.pooling import PooledRoute, PooledRouter, restored_statistics, statistics_of
from workbench.route.deciding.router import state
from workbench.route.features.statistics import Scatter, Statistics
from workbench.steps import RouteContext, register
from workbench.steps.fields import Real
from workbench.steps.route import Prompts, Router

if TYPE_CHECKING:
    from torch import Tensor


@register
class Gate(PooledRoute):
    """Choose the brick by a learned gate: a softmax over bricks from pooled hidden states of the base.

    One pass of the base through half of its blocks decides, as for `ridge`. The gate minimizes the log loss of the calibration
    prompts. To add a brick, fit it again on all bricks' prompts.
    """

    paper = "A linear router of a mixture of experts, as in Shazeer et al. 2017, arXiv 1701.06538, learned on prompts alone"
    formula = "p(i | x) = softmax(W(h(x) − μ)/σ + b),  σ² = tr(S)/d"

    route: Literal["gate"]
    strength: Real = Field(1.0, gt=0)
    """Inverse of the penalty on the weights, relative to states of unit variance."""

    def fit(self, context: RouteContext) -> Router:
        """Learn the gate, its threshold and its ties."""
        samples, layer = self.measured(context)
        assert samples.hidden is not None
        hidden = samples.hidden

        def make(rows: Tensor) -> GateRouter:
            found = statistics_of(samples, rows)
            states = scaled(hidden[rows], Scatter.of(found))
            weights, biases = fit_logistic(states.numpy(), samples.labels[rows], len(context.bricks), self.strength)
            return GateRouter(context.bricks, layer=layer, window=self.window, statistics=found, weights=weights, biases=biases)

        return self.finished(samples, make, "sum")

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
        """Return the router from its saved state."""
        fields = restored_statistics(settings, tensors, cls.name)
        bricks, size = len(fields["bricks"]), len(fields["statistics"][0].total)
        weights, biases = state(tensors, "weights", [bricks, size]), state(tensors, "biases", [bricks])
        return GateRouter(**fields, weights=weights, biases=biases)


@dataclass(frozen=True, kw_only=True)
class GateRouter(PooledRouter):
    """A softmax over bricks.

    Attributes:
        weights: [bricks, hidden size], float64.
        biases: [bricks], float64.
    """

    weights: Tensor = field(repr=False)
    biases: Tensor = field(repr=False)

    @property
    def method(self) -> str:
        """Name of the method."""
        return Gate.name

    def score(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return probabilities [n, bricks] and confidence [n]."""
        assert prompts.hidden is not None
        logits = scaled(prompts.hidden, self.scatter) @ self.weights.T + self.biases
        return logits.softmax(1), self.confidence(prompts.hidden)

    def added(self, brick: str, statistics: Statistics) -> Self:
        """Refuse a brick: the gate is learned from the prompts of all bricks together.

        Raises:
            WorkbenchError: Always.
        """
        raise WorkbenchError(
            f"a gate cannot take brick '{brick}' from its statistics ({statistics.count:g} prompts): it is learned from all bricks' prompts",
            "Fit it again with the brick in the recipe, or use `route: ridge`.",
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics of all bricks, the weights and the biases."""
        return {**super().tensors(), "weights": self.weights, "biases": self.biases}


def scaled(hidden: Tensor, scatter: Scatter) -> Tensor:
    """Return states around the center of the bricks with a mean variance of 1 [n, hidden size], float64.

    Args:
        hidden: [n, hidden size].
        scatter: Centers and scatter of the bricks.
    """
    spread = scatter.total.trace() / len(scatter.total)
    return (hidden.double() - scatter.centre) / spread.clamp(min=1e-30).sqrt()

"""What routers on pooled hidden states share: their fields, their statistics and their confidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.route.deciding.fitting import fitted
from workbench.route.deciding.router import Fitted, Joined, restored, state
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.texts import beside
from workbench.route.features.hidden import WINDOW, depth_of, pooled, token_rows
from workbench.route.features.statistics import Scatter, Statistics, by_brick, read
from workbench.steps import CalibratedRoute, RouteContext
from workbench.steps.fields import Whole
from workbench.steps.route import Router

if TYPE_CHECKING:
    from torch import Tensor

_STATISTICS = "statistics."


class PooledRoute(CalibratedRoute):
    """Base of route methods that read pooled hidden states of the base."""

    layer: Whole | None = Field(None, ge=1)
    """Number of decoder blocks that run for the choice; their output is pooled. Default: half of the depth."""
    window: Whole = Field(WINDOW, ge=1)
    """Number of last tokens that are pooled. The first token of a text does not count."""

    def measured(self, context: RouteContext) -> tuple[Samples, int]:
        """Return the calibration prompts with their pooled states, and the layer."""
        layer = depth_of(context.model, self.layer)
        samples = Samples.of(context.calibration)
        rows = token_rows(context.tokenizer, samples.texts)
        context.progress(0, 1, f"{len(rows)} prompts through {layer} blocks")
        hidden = pooled(context.model, rows, layer, self.window)
        context.progress(1, 1, f"{len(rows)} prompts through {layer} blocks")
        return samples.with_features(hidden), layer

    def finished(self, samples: Samples, make: Callable[[Tensor], PooledRouter], joined: Joined) -> Router:
        """Return the router of all samples, with ties, threshold and record.

        Args:
            samples: What `measured` returns.
            make: Fits a router to some samples.
            joined: How scores of tied bricks become one.
        """
        router = fitted(samples, make, self.abstain, self.mix, joined)
        return replace(router, record={**router.record, "beside_text": beside(samples)})


@dataclass(frozen=True, kw_only=True)
class PooledRouter(Fitted):
    """Base of routers that are computed from statistics of pooled states.

    Attributes:
        statistics: The statistics of each brick's prompts, in the order of the bricks.
    """

    statistics: tuple[Statistics, ...] = field(repr=False)

    @cached_property
    def scatter(self) -> Scatter:
        """Centers and scatter of the bricks."""
        return Scatter.of(self.statistics)

    def confidence(self, hidden: Tensor) -> Tensor:
        """Return the largest cosine with a brick's mean [n], all relative to the mean of the bricks.

        Args:
            hidden: [n, hidden size].
        """
        return cosines(self.scatter, hidden).amax(1)

    def added(self, brick: str, statistics: Statistics) -> Self:
        """Return the router with one more brick, computed from the sums of all bricks as if it had been there from the start.

        Ties and threshold stay: fit the router again to have them measured.

        Args:
            brick: The brick's name.
            statistics: The statistics of its prompts, at the router's layer and window.

        Raises:
            WorkbenchError: If the router has the brick, or the states have another size.
        """
        if brick in self.bricks:
            raise WorkbenchError(f"the router has a brick '{brick}' already", "Give the new brick another name.")
        size = len(self.statistics[0].total)
        if len(statistics.total) != size:
            raise WorkbenchError(
                f"brick '{brick}': its states have {len(statistics.total)} numbers, those of the router {size}",
                "Measure the brick's prompts on the router's base.",
            )
        return replace(self, bricks=(*self.bricks, brick), statistics=(*self.statistics, statistics), record={})

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics of all bricks."""
        found: dict[str, Tensor] = {}
        for name, part in zip(self.bricks, self.statistics, strict=True):
            found |= part.tensors(f"{_STATISTICS}{name}.")
        return found


def restored_statistics(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], method: str) -> dict[str, Any]:
    """Return the fields of a `PooledRouter` from its saved state.

    Raises:
        WorkbenchError: If settings and tensors do not belong together.
    """
    fields = restored(settings, method)
    size: int | None = None
    parts = []
    for name in fields["bricks"]:
        prefix = f"{_STATISTICS}{name}."
        size = len(state(tensors, f"{prefix}total", [size]))
        state(tensors, f"{prefix}root", [None, size])
        state(tensors, f"{prefix}count", [1])
        parts.append(read(tensors, prefix))
    return {**fields, "statistics": tuple(parts)}


def statistics_of(samples: Samples, rows: Tensor) -> tuple[Statistics, ...]:
    """Return the statistics of each brick over some samples."""
    assert samples.hidden is not None
    return tuple(by_brick(samples.hidden[rows], samples.labels[rows], len(samples.bricks)))


def cosines(scatter: Scatter, hidden: Tensor) -> Tensor:
    """Return cosines [n, bricks] of states and of the bricks' means, all relative to the mean of the bricks."""
    states = torch.nn.functional.normalize(hidden.double() - scatter.centre, dim=1)
    return states @ torch.nn.functional.normalize(scatter.means, dim=1).T

"""Centroid: the brick whose prompts have the nearest mean state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from workbench.route.deciding.hidden import WINDOW
from workbench.route.deciding.pooling import PooledRoute, PooledRouter, restored_statistics, statistics_of
from workbench.route.deciding.router import Joined
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.statistics import cosines
from workbench.steps import register
from workbench.steps.route import Router

if TYPE_CHECKING:
    from torch import Tensor


@register
class Centroid(PooledRoute):
    """Choose the brick whose calibration prompts have the nearest mean state, by the cosine relative to the mean of the bricks.

    One pass of the base through half of its blocks decides. With few templates a brick and many similar bricks it follows new
    wordings better than `ridge`.
    """

    version = 4
    paper = "Retrieval by mean embeddings, as in LoraRetriever, arXiv 2402.09997, here of the base's own states"
    formula = "sᵢ(x) = cos(h(x) − μ, mᵢ − μ)"

    joined: ClassVar[Joined] = "largest"

    route: Literal["centroid"]

    def made(self, samples: Samples, rows: Tensor, layer: int) -> CentroidRouter:
        """Return the router of some samples, without ties and threshold."""
        return CentroidRouter(samples.bricks, layer=layer, window=WINDOW, **statistics_of(samples, rows))

    @classmethod
    def restore(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Router:
        """Return the router from its saved state."""
        return CentroidRouter(**restored_statistics(settings, tensors, cls.name))


@dataclass(frozen=True, kw_only=True)
class CentroidRouter(PooledRouter):
    """Cosines with the bricks' means."""

    method: ClassVar[str] = Centroid.name

    def state_scores(self, states: Tensor) -> Tensor:
        """Return cosines [n, bricks]."""
        return cosines(self.scatter.centre, self.scatter.means, states)

"""What routers on pooled hidden states share: their fields, their statistics and their confidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.route.deciding.copies import copies
from workbench.route.deciding.fitting import fitted, template_threshold
from workbench.route.deciding.router import Fitted, Joined, restored, state
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.texts import beside
from workbench.route.features.hidden import WINDOW, depth_of, pooled, token_rows
from workbench.route.features.statistics import Scatter, Statistics, by_brick, read, shrunk
from workbench.steps import CalibratedRoute, RouteContext
from workbench.steps.fields import Whole
from workbench.steps.route import Router

if TYPE_CHECKING:
    from torch import Tensor

SHRINKAGE = 0.5
"""Weight of equal variances in the covariances of the confidence, which are measured on fewer prompts than there are dimensions."""
_STATISTICS = "statistics."


class PooledRoute(CalibratedRoute):
    """Base of route methods that read pooled hidden states of the base."""

    layer: Whole | None = Field(None, ge=1)
    """Number of decoder blocks that run for the choice; their output is pooled. Default: half of the depth."""
    window: Whole = Field(WINDOW, ge=1)
    """Number of last tokens that are pooled. The first token of a text does not count."""

    def measured(self, context: RouteContext) -> tuple[Samples, int]:
        """Return the calibration prompts with their pooled states, and the layer.

        Bricks are measured one by one, as `brick train` and `route measure` do, so that states from a card have the same bits.
        """
        layer = depth_of(context.model, self.layer)
        samples = Samples.of(context.calibration)
        parts = []
        for number, brick in enumerate(context.bricks):
            texts = [samples.texts[i] for i in (samples.labels == number).nonzero()[:, 0].tolist()]
            context.progress(number, len(context.bricks), f"{brick}: {len(texts)} prompts through {layer} blocks")
            parts.append(self._states(context, brick, texts, layer))
        context.progress(len(context.bricks), len(context.bricks), f"{len(samples.texts)} prompts through {layer} blocks")
        return samples.with_features(torch.cat(parts)), layer

    def _states(self, context: RouteContext, brick: str, texts: Sequence[str], layer: int) -> Tensor:
        """Return the states of a brick's prompts and their copies, from its card if they are there."""
        if (known := context.known.get(brick)) is not None:
            reason = known.differs(layer, self.window)
            states = None if reason else known.of(texts)
            if states is not None:
                return states
            reason = reason or "are of other prompts than its calibration prompts"
            context.notice(f"brick '{brick}': the routing statistics on its card {reason}, so its prompts are measured again")
        different = list(dict.fromkeys(texts))
        states = pooled(context.model, token_rows(context.tokenizer, different), layer, self.window)
        places = {text: row for row, text in enumerate(different)}
        return states[torch.tensor([places[text] for text in texts])]

    def finished(self, samples: Samples, make: Callable[[Tensor], PooledRouter], joined: Joined) -> Router:
        """Return the router of all samples, with ties, threshold and record.

        Args:
            samples: What `measured` returns.
            make: Fits a router to some samples.
            joined: How scores of tied bricks become one.
        """
        router = fitted(samples, make, self.abstain, self.mix, joined, template_threshold)
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

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """Cholesky factors [d, d] of the covariance within bricks and of the covariance of all prompts, both shrunk."""
        total = self.scatter.total
        spread = total.trace() / len(total)
        if not float(spread) > 0:
            raise WorkbenchError(
                "route: all calibration prompts have the same hidden state, so bricks cannot be told apart",
                "Check that the calibration files hold different prompts.",
            )
        floor = 1e-6 * spread * torch.eye(len(total), dtype=total.dtype)
        within, whole = (torch.linalg.cholesky(shrunk(part, SHRINKAGE) + floor) for part in (self.scatter.within, total))
        return within, whole

    def confidence(self, hidden: Tensor) -> Tensor:
        """Return how certainly each state belongs to a brick [n]: its direction, and how much nearer it is to a brick than to all.

        Under the covariance within bricks, D is the mean distance of the bricks' means from their center. The confidence is the largest
        cosine with a brick's mean, both relative to the center, plus (to all - to brick) / D: the distance to the center under the
        covariance of all prompts, minus the smallest distance to a brick's mean under the covariance within bricks. Distances are
        not squared: a difference of squares is the difference times the sum, so that prompts far from all calibration prompts, such as
        short ones and new wordings, would have a low confidence for their distance alone. The cosine does not depend on distance.

        Args:
            hidden: [n, hidden size].

        Source:
            The second term has the distances of Ren et al. 2021, A simple fix to Mahalanobis distance for improving near-OOD
            detection, arXiv 2106.09022, which subtracts their squares.
        """
        within, whole = self._roots
        states = (hidden.double() - self.scatter.centre).T  # [d, n]
        to_all = torch.linalg.solve_triangular(whole, states, upper=False).norm(dim=0)
        near, means = (torch.linalg.solve_triangular(within, part, upper=False).T for part in (states, self.scatter.means.T))
        to_brick = torch.stack([(near - mean).norm(dim=1) for mean in means]).amin(0)
        cosine = torch.nn.functional.normalize(near, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
        nearer: Tensor = (to_all - to_brick) / means.norm(dim=1).mean().clamp(min=1e-12)
        return cosine.amax(1) + nearer

    def added(self, brick: str, statistics: Statistics) -> Self:
        """Return the router with one more brick, computed from the sums of all bricks as if it had been there from the start.

        Ties and threshold stay: fit the router again to have them measured.

        Args:
            brick: The brick's name.
            statistics: What `measure_brick` returns for its prompts.

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


def measure_brick(model: Any, tokenizer: Any, prompts: Sequence[str], router: Router) -> Statistics:
    """Return the statistics of a brick's prompts and their copies, which `PooledRouter.added` takes.

    Args:
        model: The live base; no brick acts on it.
        tokenizer: Its tokenizer.
        prompts: The brick's prompts.
        router: The router that the brick is added to.
    """
    assert router.layer is not None
    texts = [text for number, prompt in enumerate(prompts) for text in copies(prompt, number).values()]
    return Statistics.of(pooled(model, token_rows(tokenizer, texts), router.layer, router.window))


def statistics_of(samples: Samples, rows: Tensor) -> tuple[Statistics, ...]:
    """Return the statistics of each brick over some samples. Copies count too: they make the router steady against them."""
    assert samples.hidden is not None
    return tuple(by_brick(samples.hidden[rows], samples.labels[rows], len(samples.bricks)))


def cosines(scatter: Scatter, hidden: Tensor) -> Tensor:
    """Return cosines [n, bricks] of states and of the bricks' means, all relative to the mean of the bricks."""
    states = torch.nn.functional.normalize(hidden.double() - scatter.centre, dim=1)
    return states @ torch.nn.functional.normalize(scatter.means, dim=1).T

"""NLL: the brick that makes the prompt itself most likely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from workbench.emergent.labelled import ItemRow
from workbench.emergent.losses import losses
from workbench.lazy import torch
from workbench.route.deciding.fitting import fitted
from workbench.route.deciding.measured import MeasuredRouter, standard
from workbench.route.deciding.router import restored, state
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.texts import beside
from workbench.route.features.hidden import token_rows
from workbench.route.mixing.kernel import Mix
from workbench.route.mixing.modules import Mixer
from workbench.steps import CalibratedRoute, RouteContext, register
from workbench.steps.route import Acting, Router

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@register
class Nll(CalibratedRoute):
    """Choose the brick under which the prompt's loss falls most against the base, in standard deviations over calibration prompts.

    Use it only for bricks that were trained on whole texts: bricks trained on completions make their own prompts less likely, and the
    choice is then worse than a guess. Every prompt costs a forward pass of the base and one of each brick.
    """

    paper = (
        "Comparison of routers; the loss of a text under each expert, as in Li et al. 2022, Branch-Train-Merge, arXiv 2208.03306"
    )
    formula = "sᵢ(x) = (gᵢ(x) − meanᵢ) / sdᵢ,  gᵢ(x) = nll(x | base) − nll(x | brick i), per token"

    route: Literal["nll"]

    def fit(self, context: RouteContext) -> Router:
        """Measure the losses of all prompts and their copies under each brick."""
        samples = Samples.of(context.calibration)
        mixer = Mixer(context.model, {name: context.factors(name) for name in context.bricks})

        @contextmanager
        def acting(brick: str) -> Iterator[None]:
            weights = torch.tensor([float(name == brick) for name in context.bricks])
            with mixer.acting(Mix.of(weights)):
                yield

        try:
            rows = token_rows(context.tokenizer, samples.texts)
            samples = samples.with_features(None, gains(context.model, rows, context.bricks, acting))
        finally:
            mixer.detach()

        def make(rows: Tensor) -> NllRouter:
            centre, scale = standard(samples, rows)
            return NllRouter(context.bricks, centre=centre, scale=scale)

        router = fitted(samples, make, self.abstain, self.mix, "largest")
        return replace(router, record={**router.record, "beside_text": beside(samples)})

    @classmethod
    def restore(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Router:
        """Return the router from its saved state."""
        fields = restored(settings, cls.name)
        size = [len(fields["bricks"])]
        return NllRouter(**fields, centre=state(tensors, "centre", size), scale=state(tensors, "scale", size))


@dataclass(frozen=True, kw_only=True)
class NllRouter(MeasuredRouter):
    """Standardized gains of the bricks on the prompt's own loss."""

    @property
    def method(self) -> str:
        """Name of the method."""
        return Nll.name

    def measure(self, model: PreTrainedModel, rows: Sequence[Sequence[int]], acting: Acting) -> Tensor:
        """Return the gains [n, bricks]."""
        return gains(model, rows, self.bricks, acting)


def gains(model: PreTrainedModel, rows: Sequence[Sequence[int]], bricks: Sequence[str], acting: Acting) -> Tensor:
    """Return by how much each brick lowers the mean loss per token of each row, in nats [row, brick]; 0 for rows of one token."""
    items = [ItemRow(list(row), 0) for row in rows]
    if not any(len(row) > 1 for row in rows):
        return torch.zeros(len(rows), len(bricks))
    base = losses(model, items)
    columns = []
    for brick in bricks:
        with acting(brick):
            columns.append((base.sums - losses(model, items).sums) / base.tokens.clamp(min=1))
    return torch.stack(columns, 1).float()

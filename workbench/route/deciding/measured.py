"""Routers whose scores are one number a brick, measured on the live base, made comparable between bricks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.route.deciding.router import Fitted
from workbench.route.deciding.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.steps.route import Prompts


@dataclass(frozen=True, kw_only=True)
class MeasuredRouter(Fitted):
    """The brick with the largest number, in standard deviations from its mean over calibration prompts.

    Attributes:
        centre: [bricks], each brick's mean.
        scale: [bricks], each brick's standard deviation.
    """

    centre: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)

    def score(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return the standardized numbers [n, bricks] and the largest of each row [n]."""
        assert prompts.measured is not None
        scores = (prompts.measured.double() - self.centre) / self.scale
        return scores, scores.amax(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return means and standard deviations."""
        return {"centre": self.centre, "scale": self.scale}


def standard(samples: Samples, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [bricks] of what was measured on some samples, where every brick's prompts count alike.

    Args:
        samples: The samples, with `measured`.
        rows: Numbers of samples; only prompts as they are count.
    """
    assert samples.measured is not None
    rows = rows[samples.kinds[rows] == 0]
    labels = samples.labels[rows]
    weights = (1.0 / torch.bincount(labels).double())[labels]
    weights = weights / weights.sum()
    values = samples.measured[rows].double()
    centre = weights @ values
    scale = (weights @ (values - centre).square()).sqrt()
    return centre, scale.clamp(min=1e-12)

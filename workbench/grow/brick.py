"""Brick: a new brick, trained on the frozen current model."""

from __future__ import annotations

from typing import Literal

from workbench.steps import register
from workbench.train.step import RowTraining


@register
class NewBrick(RowTraining):
    """Train a LoRA adapter, or all weights, on the frozen model of the preceding steps, and add the result to it.

    The run saves the brick in `bricks/` with a card, and caches it until an earlier part of the recipe changes. `orthogonal_to` keeps
    its A matrices orthogonal to those of other bricks (Wang et al. 2023, O-LoRA). `workbench brick train` does the same on a base.
    """

    paper = "Hu et al. 2021, LoRA, arXiv 2106.09685; Wang et al. 2023, Orthogonal Subspace Learning for Language Model Continual Learning, arXiv 2310.14152"
    formula = "θ ↦ θ + w(α/r)BA, A and B trained on frozen θ; loss + λ Σ ‖A_i Aᵀ‖² over bricks i"

    grow: Literal["brick"]

"""AvgCE: the mean of all distributions, weighted by how well each model predicts the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from workbench.fuse.teaching.step import Fused
from workbench.steps import register

if TYPE_CHECKING:
    from numpy.typing import NDArray


@register
class AvgCE(Fused):
    """Train the base on the weighted mean of all teachers' distributions (FuseLLM).

    The weights are the softmax of 1 / perplexity over the models. At a token that some models give no distribution for, the
    others' weights are scaled to sum to 1.
    """

    paper: ClassVar[str] = "Wan et al. 2024, Knowledge Fusion of Large Language Models, arXiv 2401.10491"
    formula: ClassVar[str] = "(1 − w) · CE(text, Q) + w · CE(Σ aⱼPⱼ, Q), a = softmax over models of exp(−CE(text, Pⱼ))"

    fuse: Literal["avgce"]

    def shares(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the softmax of the reciprocal perplexities of each span."""
        rewards = np.exp(np.exp(-losses))
        return np.asarray(rewards / rewards.sum(1, keepdims=True))

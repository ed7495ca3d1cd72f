"""MinCE: at every place the distribution of the model that predicts the text best."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from workbench.fuse.teaching.step import Fused
from workbench.steps import register

if TYPE_CHECKING:
    from numpy.typing import NDArray


@register
class MinCE(Fused):
    """Train the base on the distribution of the teacher that predicts each row, or each span of a row, best (FuseLLM).

    A token that this model gives no distribution for is learned from the text alone.
    """

    paper: ClassVar[str] = "Wan et al. 2024, Knowledge Fusion of Large Language Models, arXiv 2401.10491"
    formula: ClassVar[str] = "(1 − w) · CE(text, Q) + w · CE(P_j, Q), j = argmin over models of CE(text, P_j)"

    fuse: Literal["mince"]

    def shares(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return 1 for the model with the lowest loss of a span, the first one if several are equal, and 0 for the others."""
        chosen = np.zeros_like(losses)
        chosen[np.arange(len(losses)), losses.argmin(1)] = 1.0
        return chosen

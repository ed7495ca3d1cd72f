"""How far a fact of a memory is believed, from feedback on its use: a linear bandit with decay.

A use of a fact has a feature vector x, of length 1, made of [similarity of the prompt, freshness, recency, source]: freshness = g^(V - c) and
recency = g^(V - u) at version V of a fact stated at version c and last used at version u, source = 1 for facts that the recipe brought and 0
for those added later; g is the decay. With rewards r_i in {0, 1} for uses x_i at versions v_i

    A = I + sum_i g^(V - v_i) x_i x_i^T,   b = sum_i g^(V - v_i) r_i x_i,   theta = A^-1 b,
    credibility(x) = theta^T x + alpha * sqrt(x^T A^-1 x)

which is LinUCB (Li et al. 2010, arXiv 1003.0146, algorithm 1) with discounted sums, one bandit a fact. DynaMind (arXiv 2310.14248) gives facts
such estimates; its short-term memory's decay is here the discount. Without feedback the credibility is alpha; n rewards of 0 for one use take
it to alpha / sqrt(1 + n), n rewards of 1 to n / (1 + n) + alpha / sqrt(1 + n). As versions pass, both return to alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Use:
    """A use of a fact that got feedback: the version, similarity of the prompt in 0..1, reward in 0..1."""

    version: int
    similarity: float
    reward: float


@dataclass(frozen=True)
class Credibility:
    """A fact's bandit at a version.

    Attributes:
        version: The memory's version V.
        stated: Version that the fact was added or last changed at.
        recipe: Whether the recipe brought it.
        uses: Feedback since it was stated, oldest first.
        alpha: Weight of what is not known.
        decay: Discount g a version, in 0..1.
        floor: A fact below it is not used.
    """

    version: int
    stated: int
    recipe: bool
    uses: Sequence[Use]
    alpha: float
    decay: float
    floor: float

    def score(self, similarity: float) -> float:
        """Credibility in a prompt of that similarity."""
        matrix, reward = self._bandit
        x = self._features(self.version, similarity, self.uses[-1].version if self.uses else self.stated)
        inverse = np.linalg.inv(matrix)
        return float(x @ inverse @ reward + self.alpha * np.sqrt(x @ inverse @ x))

    @property
    def kept(self) -> bool:
        """Whether the fact is used: its credibility in a prompt of its own words has not sunk below the floor."""
        return self.score(1.0) >= self.floor

    @cached_property
    def _bandit(self) -> tuple[NDArray[np.float64], Vector]:
        """A and b at the version."""
        matrix, reward = np.eye(4), np.zeros(4)
        last = self.stated
        for use in self.uses:
            x = self._features(use.version, use.similarity, last)
            weight = self.decay ** (self.version - use.version)
            matrix += weight * np.outer(x, x)
            reward += weight * use.reward * x
            last = use.version
        return matrix, reward

    def _features(self, version: int, similarity: float, last: int) -> Vector:
        """x at a version, with the fact last used at version `last`."""
        fresh, recent = self.decay ** (version - self.stated), self.decay ** (version - last)
        x = np.array([similarity, fresh, recent, float(self.recipe)])
        found: Vector = x / np.linalg.norm(x)
        return found

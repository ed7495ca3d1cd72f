"""Credibility of a memory's facts, estimated from feedback on their use by a linear bandit with decay.

A use of a fact has a feature vector x, normalized to length 1, of [similarity of the prompt, freshness, recency, source]. At version V,
a fact that was stated at version c and last used at version u has freshness = g^(V - c) and recency = g^(V - u), with the decay g; source is
1 for facts of the recipe and 0 for facts that were added later. With rewards r_i in {0, 1} for uses x_i at versions v_i

    A = I + sum_i g^(V - v_i) x_i x_i^T,   b = sum_i g^(V - v_i) r_i x_i,   theta = A^-1 b,
    credibility(x) = theta^T x + alpha * sqrt(x^T A^-1 x)

which is LinUCB (Li et al. 2010, arXiv 1003.0146, algorithm 1) with discounted sums and one bandit per fact. DynaMind (arXiv 2310.14248) gives
facts such estimates; its short-term memory's decay is here the discount. Without feedback the credibility is alpha. After n rewards of 0 for
one use it is alpha / sqrt(1 + n), after n rewards of 1 it is n / (1 + n) + alpha / sqrt(1 + n). With further versions, both return to alpha.
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
    """A use of a fact with feedback: the version, the similarity of the prompt from 0 to 1, and the reward from 0 to 1."""

    version: int
    similarity: float
    reward: float


@dataclass(frozen=True)
class Credibility:
    """The bandit of one fact at one version.

    Attributes:
        version: The memory's version V.
        stated: The version at which the fact was added or last changed.
        recipe: Whether the fact is from the recipe.
        uses: Feedback since the fact was stated, oldest first.
        alpha: Weight of the uncertainty.
        decay: Discount g per version, from 0 to 1.
        floor: A fact with less credibility is not used.
    """

    version: int
    stated: int
    recipe: bool
    uses: Sequence[Use]
    alpha: float
    decay: float
    floor: float

    def score(self, similarity: float) -> float:
        """Return the credibility for a prompt with a given similarity."""
        matrix, reward = self._bandit
        x = self._features(self.version, similarity, self.uses[-1].version if self.uses else self.stated)
        inverse = np.linalg.inv(matrix)
        return float(x @ inverse @ reward + self.alpha * np.sqrt(x @ inverse @ x))

    @property
    def kept(self) -> bool:
        """True if the fact is used: its credibility for its own prompt is at least the floor."""
        return self.score(1.0) >= self.floor

    @cached_property
    def _bandit(self) -> tuple[NDArray[np.float64], Vector]:
        """The matrix A and the vector b at the version."""
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
        """Return x at a version, for a fact that was last used at version `last`."""
        recency_stated, recency_used = self.decay ** (version - self.stated), self.decay ** (version - last)
        x = np.array([similarity, recency_stated, recency_used, float(self.recipe)])
        features: Vector = x / np.linalg.norm(x)
        return features

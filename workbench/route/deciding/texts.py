"""Logistic regression on character n-grams: the router of `text`, and the comparison in the record of every other router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.route.deciding.logistic import fit_logistic
from workbench.route.deciding.router import Fitted
from workbench.route.features.tfidf import Vocabulary
from workbench.steps.route import Prompts

if TYPE_CHECKING:
    from torch import Tensor

STRENGTH = 10.0
"""Inverse of the penalty of the logistic regression."""


@dataclass(frozen=True, kw_only=True)
class TextRouter(Fitted):
    """Probabilities of the bricks from a prompt's n-grams. The confidence is the cosine with the nearest brick's mean.

    Unknown n-grams count in the cosine: a prompt of other words is not certain because of one word that it shares with a brick.

    Attributes:
        vocabulary: The n-grams.
        weights: [bricks, n-grams].
        biases: [bricks].
        means: [bricks, n-grams], of length 1.
    """

    vocabulary: Vocabulary = field(repr=False)
    weights: Tensor = field(repr=False)
    biases: Tensor = field(repr=False)
    means: Tensor = field(repr=False)

    @property
    def method(self) -> str:
        """Name of the method."""
        return "text"

    def score(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return probabilities [n, bricks] and confidence [n]."""
        rows = self.vocabulary.rows(prompts.texts)
        logits = torch.from_numpy(rows @ self.weights.T.numpy()) + self.biases
        cosine = torch.from_numpy(rows @ self.means.T.numpy())
        return logits.softmax(1), cosine.amax(1) * self.vocabulary.known(prompts.texts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the vocabulary and the regression."""
        return {**self.vocabulary.tensors(), "weights": self.weights, "biases": self.biases, "means": self.means}


def fit_texts(bricks: tuple[str, ...], texts: Sequence[str], labels: Tensor) -> TextRouter:
    """Return a text router without ties and threshold.

    Args:
        bricks: The bricks.
        texts: Prompts and descriptions.
        labels: [text], the number of the brick.
    """
    vocabulary = Vocabulary.of(texts)
    rows = vocabulary.rows(texts)
    weights, biases = fit_logistic(rows, labels, len(bricks), STRENGTH)
    members = [(labels == brick).numpy() for brick in range(len(bricks))]
    means = torch.stack([torch.from_numpy(rows[member].sum(0).A1.copy()) for member in members])
    means = means / means.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return TextRouter(bricks, vocabulary=vocabulary, weights=weights, biases=biases, means=means)

"""Text: bricks by the words of a prompt, without a pass of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workbench.ground.lazy import torch
from workbench.route.deciding.fitting import fitted
from workbench.route.deciding.router import Fitted, restored, state
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.templates import Vocabulary
from workbench.steps import CalibratedRoute, RouteContext, register
from workbench.steps.route import Prompts, Router

if TYPE_CHECKING:
    from torch import Tensor


@register
class Text(CalibratedRoute):
    """Choose the brick by a prompt's character n-grams: TF-IDF and logistic regression on calibration prompts and descriptions.

    It needs no pass of the base and makes the same choice on every base. It cannot place prompts in words that no calibration prompt
    has. Upper and lower case do not matter.
    """

    version = 2
    paper = "Pedregosa et al. 2011, scikit-learn: TfidfVectorizer, LogisticRegression"
    formula = "p(i | x) = softmax(W·tfidf(x) + b);  confidence = maxᵢ cos(tfidf(x), meanᵢ)"

    route: Literal["text"]

    def fit(self, context: RouteContext) -> Router:
        """Fit the regression, its threshold and its ties."""
        samples = Samples.of(context.calibration, context.negatives)
        places = [i for i, name in enumerate(context.bricks) if name in context.descriptions]
        described = [context.descriptions[context.bricks[i]] for i in places]

        def make(rows: Tensor) -> TextRouter:
            rows = rows[samples.kind("plain")[rows]]  # copies have the words of their prompts
            texts = [samples.texts[i] for i in rows.tolist()] + described
            return fit_texts(context.bricks, texts, torch.cat([samples.labels[rows], torch.tensor(places, dtype=torch.long)]))

        return fitted(samples, make, self, "sum", context.notice)

    @classmethod
    def restore(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Router:
        """Return the router from its saved state."""
        fields = restored(settings, cls.name)
        bricks = len(fields["bricks"])
        idf = state(tensors, "idf", [None])
        return TextRouter(
            **fields,
            vocabulary=Vocabulary.read(state(tensors, "ngrams", [None]), idf),
            weights=state(tensors, "weights", [bricks, len(idf)]),
            biases=state(tensors, "biases", [bricks]),
            means=state(tensors, "means", [bricks, len(idf)]),
        )


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

    method: ClassVar[str] = Text.name
    vocabulary: Vocabulary = field(repr=False)
    weights: Tensor = field(repr=False)
    biases: Tensor = field(repr=False)
    means: Tensor = field(repr=False)

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


def fit_logistic(rows: Any, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Return the weights and biases that minimize Σ wₙ·(−log p(label)) + ‖W‖² / (2·strength).

    wₙ makes all classes count alike: items / (classes · items of the class). The biases are free. This is scikit-learn's
    LogisticRegression(C=strength, class_weight="balanced").

    Args:
        rows: [item, feature], a scipy sparse matrix, float64.
        labels: [item], class numbers; every class occurs.
        classes: Number of classes.
        strength: Inverse of the penalty.

    Returns:
        Weights [class, feature] and biases [class], float64.
    """
    import numpy as np
    from scipy.optimize import minimize

    items, features = rows.shape
    target = labels.numpy()
    balance = items / (classes * np.bincount(target, minlength=classes)[target])
    places = (np.arange(items), target)
    transposed = rows.T.tocsr()

    def loss(flat: Any) -> tuple[float, Any]:
        weights, biases = flat[: features * classes].reshape(features, classes), flat[features * classes :]
        logits = rows @ weights + biases
        logits -= logits.max(1, keepdims=True)
        powers = np.exp(logits)
        sums = powers.sum(1, keepdims=True)
        value = -(balance * (logits[places] - np.log(sums[:, 0]))).sum() + (weights**2).sum() / (2 * strength)
        error = powers / sums
        error[places] -= 1
        error *= balance[:, None]
        gradient = transposed @ error + weights / strength
        return float(value), np.concatenate([gradient.ravel(), error.sum(0)])

    start = np.zeros(features * classes + classes)
    solved = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300, "ftol": 1e-10, "gtol": 1e-5})
    weights = solved.x[: features * classes].reshape(features, classes)
    return torch.from_numpy(weights.T.copy()), torch.from_numpy(solved.x[features * classes :].copy())

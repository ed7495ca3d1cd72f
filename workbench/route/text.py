"""Text: bricks by the words of a prompt, without a pass of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from workbench.lazy import torch
from workbench.route.deciding.fitting import fitted
from workbench.route.deciding.router import restored, state
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.texts import TextRouter, fit_texts
from workbench.route.features.tfidf import Vocabulary
from workbench.steps import CalibratedRoute, RouteContext, register
from workbench.steps.route import Router

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

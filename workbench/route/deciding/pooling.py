"""Fit, keep and restore the routers that read pooled hidden states, and say how certain they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.ground.project import find_project
from workbench.route.deciding.encoder import FILES, Encoder
from workbench.route.deciding.fitting import fitted
from workbench.route.deciding.hidden import WINDOW, depth_of, pooled, token_rows
from workbench.route.deciding.router import REFUSED, Fitted, FittedFields, Joined, restored, state
from workbench.route.deciding.samples import OUTSIDE, OWN, Samples
from workbench.route.deciding.statistics import Scatter, Statistics, by_brick, cosines, shrunk, solve
from workbench.steps import CalibratedRoute, RouteContext
from workbench.steps.route import Decisions, Prompts, Router, SentenceEncoder

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


SHRINKAGE = 0.3
"""Weight of equal variances in the covariances of the confidence, which are measured on fewer prompts than there are dimensions."""
STRENGTH = 0.1
"""Penalty of a ridge regression, relative to the mean variance of the states."""
FOLLOWING = 0.5
"""What the message before adds to the confidence of one on the same brick. From .3 to .75 nothing that leaves the topic stays with it."""
ENCODED = 2.0
"""Weight of the sentence encoder's cosines in the scores: the largest with which a paragraph before a prompt changes no choice."""
_UNREAD = (
    "the base tells the built-in requests that no brick is for apart less than the prompts of one brick, as if it could not read them, so "
    "the threshold may be too low: set `threshold:` by `workbench route check` on requests of your own"
)
_STATISTICS, _NEGATIVES, _REFUSED, _ENCODED = "statistics.", "negatives.", "refused.", "encoded"


class PooledRoute(CalibratedRoute):
    """Base of route methods that read pooled hidden states of the base."""

    constants: ClassVar[Mapping[str, object]] = {**CalibratedRoute.constants, "layer": None, "window": WINDOW}
    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"encoder"})
    joined: ClassVar[Joined]

    encoder: str | None = None
    """Folder of a sentence encoder, as sentence-transformers writes it, whose cosines are added to scores and confidence: among many bricks
    and in new wordings it knows better what a prompt is about, and costs some milliseconds a prompt."""

    def inputs(self) -> list[str]:
        """Return the files of prompts, of negatives and of the encoder."""
        return [*super().inputs(), *(f"{self.encoder}/{name}" for name in FILES if self.encoder)]

    def check_inputs(self, project: Path) -> None:
        """Read every file once, so that errors in it appear before any work."""
        super().check_inputs(project)
        self.sentence_encoder(project)

    def sentence_encoder(self, project: Path) -> SentenceEncoder | None:
        """Return the step's sentence encoder."""
        return Encoder.of(self.encoder, project) if self.encoder else None

    def measured(self, context: RouteContext) -> tuple[Samples, int]:
        """Return the calibration prompts with their pooled states and their vectors by the sentence encoder, and the layer.

        Bricks are measured one by one, as `brick train`, `route measure` and `route add` do, so that the numbers have the same bits.
        """
        layer, total = depth_of(context.model), len(context.bricks)
        samples = Samples.of(context.calibration, context.negatives)
        parts, vectors = [], []
        for number, brick in enumerate(context.bricks):
            texts = [samples.texts[i] for i in (samples.labels == number).nonzero()[:, 0].tolist()]
            context.progress(number, total, f"{brick}: {len(texts)} prompts through {layer} blocks")
            parts.append(self._states(context, brick, texts, layer))
            vectors += [context.encoder(texts)] if context.encoder else []
        others = [text for text, inside in zip(samples.texts, samples.inside.tolist(), strict=True) if not inside]
        context.progress(total, total, f"{len(others)} other requests through {layer} blocks")
        parts.append(pooled(context.model, token_rows(context.tokenizer, others), layer, WINDOW))
        vectors += [context.encoder(others)] if context.encoder else []
        context.progress(total, total, f"{len(samples.texts)} prompts through {layer} blocks")
        return samples.with_features(torch.cat(parts), torch.cat(vectors) if vectors else None), layer

    def _states(self, context: RouteContext, brick: str, texts: Sequence[str], layer: int) -> Tensor:
        """Return the states of a brick's prompts and their copies, from its card if they are there."""
        if (known := context.known.get(brick)) is not None:
            reason = known.differs(layer, WINDOW)
            states = None if reason else known.of(texts)
            if states is not None:
                return states
            reason = reason or "are of other prompts than its calibration prompts"
            context.notice(f"brick '{brick}': the routing statistics on its card {reason}, so its prompts are measured again")
        return states_of_texts(context.model, context.tokenizer, texts, layer)

    def fit(self, context: RouteContext) -> Router:
        """Measure the prompts, and fit the router with its ties and its threshold."""
        samples, layer = self.measured(context)
        return self.fitted(samples, layer, context.notice, context.encoder)

    def fitted(
        self, samples: Samples, layer: int, notice: Callable[[str], None], encoder: SentenceEncoder | None = None
    ) -> PooledRouter:
        """Return the router of samples, with ties, threshold and record.

        Args:
            samples: Prompts with their states, measured now or for an earlier router.
            layer: Number of decoder blocks that the states come from.
            notice: Receives lines for the user.
            encoder: The sentence encoder that the samples' vectors are of.
        """
        # The sum of cosines of tied bricks is no cosine.
        joined = "largest" if encoder else self.joined
        router = fitted(samples, lambda rows: self.made(samples, rows, layer), self, joined, notice)
        warnings = router.record["warnings"]
        if isinstance(warnings, list) and float(router.negatives.covariance.trace()) < float(router.scatter.within.trace()):
            notice(_UNREAD)
            router = replace(router, record={**router.record, "warnings": [*warnings, _UNREAD]})
        return replace(router, samples=samples, encoder=encoder)

    def made(self, samples: Samples, rows: Tensor, layer: int) -> PooledRouter:
        """Return the router of some samples, without ties and threshold."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PooledRouter(Fitted):
    """Base of routers that are computed from statistics of pooled states.

    Attributes:
        statistics: The statistics of each brick's prompts, in the order of the bricks.
        negatives: Those of the built-in requests that no brick is for.
        refused: Brick -> those of the step's own negatives that are most like the brick's prompts.
        encoded: [bricks, size], float64, the mean vector of each brick's prompts by the sentence encoder; None without one.
        encoder: The sentence encoder.
        samples: What it was fitted on; None for a router that is read from its files.
    """

    statistics: tuple[Statistics, ...] = field(repr=False)
    negatives: Statistics = field(repr=False)
    refused: dict[str, Statistics] = field(default_factory=dict, repr=False)
    encoded: Tensor | None = field(default=None, repr=False)
    encoder: SentenceEncoder | None = None
    samples: Samples | None = field(default=None, repr=False)

    @cached_property
    def scatter(self) -> Scatter:
        """Centers and scatter of the bricks."""
        return Scatter.of(self.statistics)

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """Cholesky factors [d, d] of the covariance within bricks and of the covariance of the negatives, both shrunk."""
        others = self.negatives.covariance
        spread = float(self.scatter.total.trace()) / len(others)
        if not spread > 0:
            raise WorkbenchError(
                "route: all calibration prompts have the same hidden state, so bricks cannot be told apart",
                "Check that the calibration files hold different prompts.",
            )
        floor = 1e-6 * spread * torch.eye(len(others), dtype=others.dtype)
        # To a base that cannot read the negatives they are all alike, and every prompt would be infinitely far from them.
        parts = (shrunk(self.scatter.within, SHRINKAGE), shrunk(others, SHRINKAGE, spread))
        within, around = (torch.linalg.cholesky(part + floor) for part in parts)
        return within, around

    def confidence(self, states: Tensor) -> Tensor:
        """Return how certainly each state belongs to a brick [n]: its direction, and how much nearer it is to a brick than to negatives.

        Under the covariance within bricks, D is the mean distance of the bricks' means from their center. The confidence is the largest
        cosine with a brick's mean, both relative to the center, plus (to negatives - to brick) / D: the distance to the mean of the
        negatives under their covariance, minus the smallest distance to a brick's mean under the covariance within bricks. Distances
        are not squared: a difference of squares is the difference times the sum, so that prompts far from all calibration prompts, such
        as short ones and new wordings, would have a low confidence for their distance alone. The cosine does not depend on distance.

        Source:
            The second term has the distances of Ren et al. 2021, A simple fix to Mahalanobis distance for improving near-OOD
            detection, arXiv 2106.09022, which subtracts their squares, and takes all prompts in the place of the negatives.

        Args:
            states: [n, hidden size].
        """
        within, around = self._roots
        states = states.double()
        to_others = torch.linalg.solve_triangular(around, (states - self.negatives.mean).T, upper=False).norm(dim=0)
        near, means = (
            torch.linalg.solve_triangular(within, part.T, upper=False).T
            for part in (states - self.scatter.centre, self.scatter.means)
        )
        to_brick = torch.stack([(near - mean).norm(dim=1) for mean in means]).amin(0)
        cosine = torch.nn.functional.normalize(near, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
        nearer: Tensor = (to_others - to_brick) / means.norm(dim=1).mean().clamp(min=1e-12)
        return cosine.amax(1) + nearer

    @cached_property
    def _refusing(self) -> tuple[Tensor, Tensor]:
        """Center [hidden size] and map [hidden size, bricks + refused] of a ridge regression that has the step's own negatives as classes."""
        scatter = Scatter.of([*self.statistics, *self.refused.values()])
        return scatter.centre, solve(scatter, STRENGTH)

    def score(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return scores [n, bricks] and confidence [n] of the window of each prompt that has the largest confidence.

        With a sentence encoder, its cosines are added: to the scores with weight `ENCODED`, the largest of them to the confidence.
        """
        assert prompts.hidden is not None
        count, places, size = prompts.hidden.shape
        confidence, best = self.confidence(prompts.hidden.reshape(-1, size)).reshape(count, places).max(1)
        states = prompts.hidden[torch.arange(count), best].double()
        scores = self.state_scores(states)
        if self.encoded is not None:
            near = self._encoded_cosines(self.encoded, prompts)
            scores, confidence = scores + ENCODED * near, confidence + near.amax(1)
        if self.refused:
            centre, weights = self._refusing
            confidence[((states - centre) @ weights).argmax(1) >= len(self.bricks)] = REFUSED
        return scores, confidence

    def _encoded_cosines(self, means: Tensor, prompts: Prompts) -> Tensor:
        """Return cosines [n, bricks] of prompts and of the bricks' means as the sentence encoder sees them, relative to the bricks' mean."""
        vectors = prompts.measured
        if vectors is None:
            assert self.encoder is not None
            vectors = self.encoder(prompts.texts)
        centre = means.mean(0)
        return cosines(centre, means - centre, vectors)

    def follow(self, texts: Sequence[str], hidden: Tensor, topics: Tensor) -> Decisions:
        """Decide about messages of a conversation that no brick is sure of: they stay with the brick before if they are most like its prompts.

        "And 51 and 8?" is like no calibration prompt, and a near miss of some, so that the step's own negatives do not count here. Its states
        behind "What is 17 + 25?" are; those of "Tell me a joke." are not.

        Args:
            texts: The messages, each behind those before it.
            hidden: [n, window, hidden size], the states of the messages behind those before them; see `pooled_behind`.
            topics: [n], the number of the brick that the message before went to.

        Returns:
            The decisions; `FOLLOWING` is part of the confidence, to which the threshold applies.
        """
        scores, confidence = replace(self, refused={}).score(Prompts(texts, hidden))
        joined, confidence = self.choice.join(scores.float(), self.bricks), confidence.float() + FOLLOWING
        weights = self.choice.weigh(joined, self.bricks, confidence)
        weights[weights.argmax(1) != topics] = 0.0
        return Decisions(weights, joined, confidence)

    def state_scores(self, states: Tensor) -> Tensor:
        """Return scores [n, bricks] of pooled states [n, hidden size], float64."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics of all bricks and negatives."""
        found = self.negatives.tensors(_NEGATIVES)
        for name, part in zip(self.bricks, self.statistics, strict=True):
            found |= part.tensors(f"{_STATISTICS}{name}.")
        for name, part in self.refused.items():
            found |= part.tensors(f"{_REFUSED}{name}.")
        return found if self.encoded is None else {**found, _ENCODED: self.encoded}

    def own_settings(self) -> dict[str, object]:
        """Return the sentence encoder, by its folder and its digest."""
        return {"encoder": {"path": self.encoder.named, "digest": self.encoder.digest}} if self.encoder else {}


class StatisticsFields(TypedDict):
    """Fields of `PooledRouter` that are measured."""

    statistics: tuple[Statistics, ...]
    negatives: Statistics
    refused: dict[str, Statistics]
    encoded: Tensor | None


class PooledFields(FittedFields, StatisticsFields):
    """Fields of `PooledRouter` that are read from its files."""

    encoder: SentenceEncoder | None


def restored_statistics(settings: Mapping[str, object], tensors: Mapping[str, Tensor], method: str) -> PooledFields:
    """Return the fields of a `PooledRouter` from its saved state."""
    fields = restored(settings, method)
    size = len(state(tensors, f"{_NEGATIVES}total", [None]))

    def part(prefix: str) -> Statistics:
        state(tensors, f"{prefix}total", [size])
        state(tensors, f"{prefix}root", [None, size])
        state(tensors, f"{prefix}count", [1])
        return Statistics.read(tensors, prefix)

    return {
        **fields,
        "statistics": tuple(part(f"{_STATISTICS}{name}.") for name in fields["bricks"]),
        "negatives": part(_NEGATIVES),
        "refused": {name: part(f"{_REFUSED}{name}.") for name in fields["bricks"] if f"{_REFUSED}{name}.total" in tensors},
        "encoded": tensors.get(_ENCODED),
        "encoder": _restored_encoder(settings),
    }


def _restored_encoder(settings: Mapping[str, object]) -> SentenceEncoder | None:
    """Return the sentence encoder that a router was fitted with, whose folder is relative to the project."""
    found = settings.get("encoder")
    return Encoder.of(str(found["path"]), find_project(), str(found["digest"])) if isinstance(found, dict) else None


def states_of_texts(model: Any, tokenizer: Any, texts: Sequence[str], layer: int) -> Tensor:
    """Run the base over the prompts and copies of one brick, each once: what runs together decides the last bits in bfloat16."""
    different = list(dict.fromkeys(texts))
    places = {text: row for row, text in enumerate(different)}
    return pooled(model, token_rows(tokenizer, different), layer, WINDOW)[torch.tensor([places[text] for text in texts])]


def statistics_of(samples: Samples, rows: Tensor) -> StatisticsFields:
    """Return the fields of a `PooledRouter` that are measured on some samples, each in the window that ends with it.

    Copies count too: they make the router steady against them.
    """
    assert samples.hidden is not None
    states, labels = samples.hidden[rows, 0], samples.labels[rows]
    found = tuple(by_brick(states, labels, len(samples.bricks)))
    own = states[labels == OWN]
    scatter = Scatter.of(found)
    nearest = cosines(scatter.centre, scatter.means, own).argmax(1)
    refused = {name: Statistics.of(own[nearest == i]) for i, name in enumerate(samples.bricks) if bool((nearest == i).any())}
    encoded = None
    if samples.measured is not None:
        vectors = samples.measured[rows].double()
        encoded = torch.stack([vectors[labels == brick].mean(0) for brick in range(len(samples.bricks))])
    return {
        "statistics": found,
        "negatives": Statistics.of(states[labels == OUTSIDE]),
        "refused": refused,
        "encoded": encoded,
    }

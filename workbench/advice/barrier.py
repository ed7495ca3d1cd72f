"""Loss barriers: the loss of the models on the line between two models of one shape, and what it says about merging them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import losses
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events, progress
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number, Result
from workbench.merge.streaming.deltas import StepBricks
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import encode, longest_row, read_texts
from workbench.recipe.methods import method
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.compose import step_context
from workbench.scores.statistics import resampled_means
from workbench.steps import MergeMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POINTS = 11
LEAST_TEXTS = 8
"""Fewest texts for an interval."""
SMALL = 0.02
"""Share of the ends' mean loss up to which a barrier counts as none."""
LONGEST = 1024
"""Largest number of tokens of a text."""
_RESAMPLES = 2000
Verdict = Literal["none", "small", "high"]


class LinePoint(JsonObject):
    """A model on the line between the two."""

    t: Number
    """Position: 0 is the first model, 1 the second one."""
    loss: Number
    """Mean over texts of the mean loss per predicted token, in nats."""
    low: Number
    """Lower end of the 95 % interval over texts."""
    high: Number
    """Upper end of the interval."""
    above: Number
    """Rise of the loss above the straight line between the losses of the ends."""


class BarrierHeight(JsonObject):
    """The largest rise above the line."""

    value: Number
    """The barrier, in nats; 0 if no point is above the line."""
    low: Number
    """Lower end of the 95 % interval, paired over texts."""
    high: Number
    """Upper end of the interval."""
    t: Number
    """Position of the barrier."""


class Barrier(Result):
    """Loss along the line between two models."""

    first: str
    """The first model."""
    second: str
    """The second model."""
    base: str | None
    """The model that both are bricks of; null if the second one is compared with the first."""
    texts: str
    """File of the texts."""
    items: int
    """Number of texts."""
    tokens: int
    """Number of predicted tokens."""
    points: list[LinePoint]
    """The models, from the first to the second."""
    barrier: BarrierHeight
    """The barrier."""
    verdict: Verdict
    """The verdict on the barrier. "none": linear merging has a chance; "high": it has none; "small": in between, or unclear."""
    says: str
    """The verdict as a sentence."""


@dataclass(frozen=True)
class Line:
    """Losses on the line between two models.

    Attributes:
        points: Position t of each model θ(t) = (1 − t) θ₁ + t θ₂ [points].
        losses: Mean loss per predicted token of each text, in nats [points, texts].
    """

    points: NDArray[np.float64]
    losses: NDArray[np.float64]

    def above(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how far losses [points, ...] are above the straight line between those of the ends."""
        t = self.points.reshape(-1, *([1] * (losses.ndim - 1)))
        height: NDArray[np.float64] = losses - ((1 - t) * losses[0] + t * losses[-1])
        return height

    def barrier(self) -> tuple[float, float]:
        """Return the barrier and its position.

        The barrier is max over t of L(θ(t)) − ((1 − t) L(θ₁) + t L(θ₂)), with L the mean over texts.

        Source:
            Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv 1912.05671, section 2: error
            barrier of two networks, there above the mean of the ends; the line between the ends as in Entezari et al. 2021, eq. 1.
        """
        heights = self.above(self.losses.mean(1))
        at = int(np.argmax(heights))
        return float(heights[at]), float(self.points[at])

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the barrier.

        Texts are resampled, the same ones at every point, so the interval is paired over texts; each resample takes its own maximum
        over the points.
        """
        low, high = np.quantile(self.above(self._resampled).max(0), (0.025, 0.975))
        return float(low), float(high)

    def rows(self) -> list[LinePoint]:
        """Return the mean loss at each point with its 95 % interval, and its rise above the line."""
        means = self.losses.mean(1)
        lows, highs = np.quantile(self._resampled, (0.025, 0.975), axis=1)
        return [
            LinePoint(t=round(float(t), 6), loss=float(mean), low=float(low), high=float(high), above=float(above))
            for t, mean, low, high, above in zip(self.points, means, lows, highs, self.above(means), strict=True)
        ]

    @cached_property
    def _resampled(self) -> NDArray[np.float64]:
        """Mean losses of resampled texts [points, resamples]."""
        return resampled_means(self.losses, np.arange(self.losses.shape[1]), seed=0, reps=_RESAMPLES)


def measure_barrier(
    first: str,
    second: str,
    texts: Path,
    *,
    project: Path,
    device: torch.device,
    base: str | None = None,
    events: Events = no_events,
) -> Barrier:
    """Measure the loss on held-out texts along the line between two models.

    Args:
        first: A checkpoint, or with `base` any brick.
        second: A checkpoint of the same shapes, or an adapter or recipe on the first one; with `base` any brick.
        texts: A jsonl file of {"text"}, or of {"prompt", "completion"}, of which the completion's loss counts.
        project: Folder that relative paths start from.
        device: Device of the models; three copies of the weights are in memory in float32.
        base: The model that both are bricks of.
        events: Receives progress.

    Raises:
        WorkbenchError: If the models do not have one shape and vocabulary, or there are too few texts.
    """
    read = read_texts(texts, str(texts))
    if len(read) < LEAST_TEXTS:
        raise WorkbenchError(
            f"{texts}: {len(read)} texts, expected {LEAST_TEXTS} or more: the interval is taken over texts", "Add held-out texts."
        )
    resolved = resolve(from_data(_recipe(first, second, base), project))
    tokenizer = load_tokenizer(resolved.tokenizer_at(0))
    rows = encode(read, tokenizer, longest_row(resolved.base.config, LONGEST))
    items = [ItemRow(row.tokens, len(row.tokens) - row.learned) for row in rows]
    model_at = _models(resolved, device, events)
    points = np.linspace(0, 1, POINTS)
    report, measured, counts = progress(events, "barrier", "line"), [], np.zeros(0)
    for number, t in enumerate(points):
        report(number, POINTS, f"t = {t:.1f}")
        found = losses(model_at(float(t)), items, scored="response")
        measured.append((found.sums / found.tokens).numpy())
        counts = found.tokens.numpy()
    report(POINTS, POINTS, "done")
    line = Line(points, np.stack(measured))
    low, high = line.interval()
    value, at = line.barrier()
    verdict, says = _verdict(line, low, high)
    return Barrier(
        first=first,
        second=second,
        base=base,
        texts=str(texts),
        items=len(items),
        tokens=int(counts.sum()),
        points=line.rows(),
        barrier=BarrierHeight(value=value, low=low, high=high, t=at),
        verdict=verdict,
        says=says,
    )


def _recipe(first: str, second: str, base: str | None) -> dict[str, object]:
    """Return a recipe with both models, whose headers `resolve` then compares."""

    def reference(model: str) -> dict[str, object]:
        return {"recipe" if model.endswith((".yaml", ".yml")) else "path": model, "any_base": True}

    if base is None:
        step: dict[str, object] = {"merge": "task_arithmetic", "bricks": {"second": 0.5}}
        bricks = {"second": reference(second)}
    else:
        step = {"merge": "linear", "bricks": {"first": 0.5, "second": 0.5}}
        bricks = {"first": reference(first), "second": reference(second)}
    return {"version": 1, "name": "barrier", "base": base or first, "bricks": bricks, "steps": [step]}


def _models(resolved: Resolved, device: torch.device, events: Events) -> Callable[[float], PreTrainedModel]:
    """Return a function from t to the live model θ(t), in float32. It changes one model in place, so use each before the next.

    The ends are computed by the linear merge of deltas. Parameters between them are interpolated on the live model, whose tensors are
    those of the files in another arrangement.
    """
    context, base = step_context(resolved, 0, device, events), resolved.base
    deltas = {name: context.deltas(name) for name in resolved.recipe.parents}
    name = resolved.recipe.steps[0].name
    made = method(MergeMethod, name)

    def end(t: float) -> PreTrainedModel:
        weights = {brick: 1 - t if brick == "first" else t for brick in deltas}
        line = MergedWeights(base, base, made.model_validate({"merge": name, "bricks": weights}), StepBricks(deltas))
        tensors = compute(Model(line, base.config), torch.float32, device)
        return live_model(base.config, tensors, resolved.tokenizer_at(0), device)

    model, other = end(0.0), end(1.0)
    starts = [parameter.detach().clone() for parameter in model.parameters()]
    stops = [parameter.detach() for parameter in other.parameters()]

    def model_at(t: float) -> PreTrainedModel:
        with torch.no_grad():
            for parameter, start, stop in zip(model.parameters(), starts, stops, strict=True):
                parameter.copy_(torch.lerp(start, stop, t))
        return model

    return model_at


def _verdict(line: Line, low: float, high: float) -> tuple[Verdict, str]:
    """Return "none", "small" or "high", and the sentence that says whether linear merging has a chance."""
    means = line.losses.mean(1)
    ends, inside = (means[0] + means[-1]) / 2, means[1:-1]
    if high <= SMALL * ends:
        return (
            "none",
            "No barrier: the models between the two are about as good as their ends, so linear merging has a chance here.",
        )
    if low > SMALL * ends and inside.min() > max(means[0], means[-1]):
        return "high", (
            "A high barrier: every model between the two is worse than both ends, so linear merging has no chance here. Models that were "
            "trained apart need their neurons aligned first, or routing instead of merging."
        )
    return "small", (
        "A barrier that part of the line avoids, or that these texts cannot tell: linear merging may work near one end, with small "
        "weights; more texts narrow the interval."
    )

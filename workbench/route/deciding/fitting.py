"""From calibration prompts to a fitted router: folds, ties, threshold and record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.route.deciding.router import REFUSED, Choice, Fitted, Joined
from workbench.route.deciding.samples import COPIES, OUTSIDE, OWN, Samples
from workbench.steps import CalibratedRoute

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R", bound=Fitted)
ROUTED = 0.1
"""Share of the built-in requests that lie above the lower end of the threshold."""
WEIGHT = 0.3
"""Place of the threshold between the requests (0) and the bricks' prompts (1)."""
CURVE = (0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Shares of routed requests of which a curve has the cost."""
CONFUSED = 0.3
"""Share of a brick's held-out prompts that go to another brick from which on the two are tied."""


@dataclass(frozen=True)
class HeldOut:
    """Scores of samples by routers that were fitted without them.

    Attributes:
        scores: [sample, brick].
        confidence: [sample].
    """

    scores: Tensor
    confidence: Tensor


def threshold_of(samples: Samples, confidence: Tensor, share: float) -> dict[str, float]:
    """Return the threshold with the two quantiles that it lies between.

    Confidences of other requests end near `negatives`, those of the bricks' prompts begin near `prompts`. The threshold lies `WEIGHT` of
    the way from the first to the second: it rises where the two are far apart, so that a few odd prompts do not decide it.

    Args:
        samples: The samples.
        confidence: [sample], by routers that were fitted without the sample's template or task.
        share: Share of the bricks' prompts and copies below `prompts`, where every brick counts alike.
    """
    judged = confidence > REFUSED  # no threshold decides about the others
    inside, others = judged & samples.inside, confidence[judged & (samples.labels == OUTSIDE)]
    if not bool(inside.any()):
        raise WorkbenchError(
            "route: every calibration prompt is more like one of `negatives` than like its brick's other prompts",
            "Name other requests under `negatives`, or remove it.",
        )
    lowest = quantile(confidence[inside], samples.labels[inside], share)
    outside = float(others.quantile(1 - ROUTED)) if len(others) else lowest
    return {"threshold": outside + WEIGHT * (lowest - outside), "negatives": outside, "prompts": lowest}


def curve_of(inside: Tensor, outside: Tensor) -> list[dict[str, float]]:
    """Return false abstention against false routing: for some shares of routed requests, the threshold and what it costs.

    Returns:
        `threshold`, `to_base` (share of `inside` below it) and `routed` (share of `outside` that is not), from the lowest threshold.
    """
    if not len(inside) or not len(outside):
        return []
    inside, ranked = inside.float(), outside.float().sort(descending=True).values  # as routers compare them
    above = torch.nextafter(ranked, torch.tensor(torch.inf))
    rows = {}
    for share in CURVE:
        allowed = int(share * len(ranked) + 1e-9)
        at = float(above[allowed])  # the first request that is not routed lies just below
        rows[at] = {
            "threshold": at,
            "to_base": round(float((inside < at).double().mean()), 4),
            "routed": round(float((ranked >= at).double().mean()), 4),
        }
    return [rows[at] for at in sorted(rows)]


def fitted(
    samples: Samples, make: Callable[[Tensor], R], step: CalibratedRoute, joined: Joined, notice: Callable[[str], None]
) -> R:
    """Return the router of all samples with its ties, its threshold and its record."""
    by_template = held_out(samples, samples.by_template, make)
    at_random = held_out(samples, samples.at_random, make)
    confusion = confusion_of(samples, at_random.scores)
    ties = tied(samples.bricks, confusion)
    found = None if step.abstain is None else threshold_of(samples, by_template.confidence, step.abstain)
    threshold = step.threshold if step.threshold is not None or found is None else found["threshold"]
    choice = Choice(threshold, ties, joined)
    router = make(torch.arange(len(samples.texts)))
    warnings = samples.warnings()
    for warning in warnings:
        notice(warning)
    record = {
        "prompts": {name: int((samples.kind("plain") & (samples.labels == i)).sum()) for i, name in enumerate(samples.bricks)},
        "templates": samples.templates,
        "accuracy": accuracies(samples, choice, at_random, by_template),
        "ties": _described(samples.bricks, confusion, ties),
        "abstain": _abstention(samples, step.abstain, threshold, found, by_template) if found and threshold is not None else None,
        "curve": curve_of(by_template.confidence[samples.inside], by_template.confidence[samples.labels == OUTSIDE]),
        "warnings": warnings,
    }
    return replace(router, choice=choice, record=record)


def held_out(samples: Samples, fold_of: Tensor, make: Callable[[Tensor], Fitted]) -> HeldOut:
    """Return the scores of each sample by a router of the other folds. A brick that lies in one fold is never left out whole.

    Args:
        samples: The samples, of bricks and of others.
        fold_of: [sample], the fold.
        make: Fits a router to some samples.
    """
    scores = torch.zeros(len(samples.texts), len(samples.bricks))
    confidence = torch.zeros(len(samples.texts))
    for fold in sorted(set(fold_of.tolist())):
        outside = fold_of != fold
        for brick in range(len(samples.bricks)):
            own = samples.labels == brick
            if not bool((outside & own).any()):
                outside |= own
        inside = (fold_of == fold).nonzero()[:, 0]
        found, sure = make(outside.nonzero()[:, 0]).score(samples.prompts(inside))
        scores[inside], confidence[inside] = found.float(), sure.float()
    return HeldOut(scores, confidence)


def confusion_of(samples: Samples, scores: Tensor) -> Tensor:
    """Return [brick, brick], the share of a brick's prompts (as they are) whose highest score is that of the other."""
    plain = samples.kind("plain")
    size = len(samples.bricks)
    pairs = samples.labels[plain] * size + scores[plain].argmax(1)
    counts = torch.bincount(pairs, minlength=size * size).reshape(size, size).double()
    return counts / counts.sum(1, keepdim=True)


def tied(bricks: tuple[str, ...], confusion: Tensor) -> tuple[tuple[str, ...], ...]:
    """Return the groups of bricks that are confused with each other at least `CONFUSED` of the time, in the order of the bricks.

    Args:
        bricks: The bricks.
        confusion: [brick, brick], on prompts whose templates other folds have: bricks for different tasks are told apart there.
    """
    group = list(range(len(bricks)))
    for i in range(len(bricks)):
        for j in range(i):
            if max(float(confusion[i, j]), float(confusion[j, i])) >= CONFUSED:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    found = [tuple(name for name, g in zip(bricks, group, strict=True) if g == number) for number in sorted(set(group))]
    return tuple(names for names in found if len(names) > 1)


def quantile(confidence: Tensor, labels: Tensor, share: float) -> float:
    """Return the threshold below which `share` of the samples lie, where every brick counts alike.

    Args:
        confidence: [sample].
        labels: [sample], numbers of bricks.
        share: From 0 to below 1. 0 gives the smallest confidence.
    """
    order = confidence.argsort()
    weights = (1.0 / torch.bincount(labels).double())[labels][order]
    below = weights.cumsum(0) - weights  # weight of the samples before each one
    place = int((below <= share * weights.sum() + 1e-9).sum()) - 1
    return float(confidence[order][place])


def right(choice: Choice, bricks: tuple[str, ...], scores: Tensor, labels: Tensor) -> Tensor:
    """Return [sample], true if the highest joined score is that of the sample's brick or of one that it is tied with."""
    joined = choice.join(scores, bricks)
    own = joined.gather(1, labels.clamp(min=0)[:, None])[:, 0]  # samples without a brick are not read
    return own >= joined.amax(1)


def accuracies(samples: Samples, choice: Choice, at_random: HeldOut, by_template: HeldOut) -> dict[str, dict[str, float | None]]:
    """Return the share of samples whose brick (or one tied with it) has the highest score.

    `seen_templates` are folds that hold prompts out, `held_out_templates` are folds that hold templates out; both for each kind of
    copy, and the latter for each brick.
    """
    table: dict[str, dict[str, float | None]] = {}
    for name, result in (("seen_templates", at_random), ("held_out_templates", by_template)):
        hits = right(choice, samples.bricks, result.scores, samples.labels)
        table[name] = {kind: _mean(hits[samples.kind(kind)]) for kind in COPIES}
    hits = right(choice, samples.bricks, by_template.scores, samples.labels)
    plain = samples.kind("plain")
    table["by_brick"] = {name: _mean(hits[plain & (samples.labels == i)]) for i, name in enumerate(samples.bricks)}
    return table


def _described(bricks: tuple[str, ...], confusion: Tensor, ties: tuple[tuple[str, ...], ...]) -> list[dict[str, object]]:
    """Return each tie with its largest confusion and the brick that acts."""
    rows = []
    for group in ties:
        places = [bricks.index(name) for name in group]
        part = confusion[places][:, places].clone().fill_diagonal_(0)
        rows.append({"bricks": list(group), "confusion": round(float(part.max()), 4), "acts": group[0]})
    return rows


def _abstention(
    samples: Samples, share: float | None, threshold: float, found: dict[str, float], result: HeldOut
) -> dict[str, object]:
    """Return the threshold beside the one that the rule finds, and what it costs on held-out samples."""
    below = result.confidence < threshold
    own = ~below[samples.labels == OWN]
    return {
        "share": share,
        "threshold": threshold,
        "rule": found,
        "to_base": {kind: _mean(below[samples.kind(kind)]) for kind in COPIES},
        "routed": _mean(~below[samples.labels == OUTSIDE]),
        **({"routed_negatives": _mean(own)} if len(own) else {}),
    }


def _mean(hits: Tensor) -> float | None:
    """Return the share of true values; None if there are none."""
    return round(float(hits.double().mean()), 4) if len(hits) else None

"""A scorer against lm-eval's own HFLM on a few documents of each task, before its numbers count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from workbench.evaluate.packed import LOGITS, Answer, Bounds, Forward, Pair, bounds_of, lay_out, start_for
from workbench.scores.store import Check

if TYPE_CHECKING:
    from workbench.evaluate.hflm import SafeHFLM

_DOCUMENTS = 4  # of each task
_NATS = 1e-4  # in float32, for log-likelihoods up to 100 nats; relative beyond, as float32 sums round


class RefusedError(Exception):
    """The scorer does not agree with HFLM on this model; the message says by how much, or what it raised."""


def checked(lm: SafeHFLM, forward: Forward, tasks: Sequence[Sequence[Pair]], scorer: str) -> Check:
    """Compare, on the documents of each task with the longest row and three spread over the rest.

    In float32 log-likelihoods agree to 1e-4 nats. In narrower dtypes HFLM itself gives other numbers for other batch sizes: there a
    difference may be twice the largest of those, measured here between its batch size, a quarter of it and 1, and is never
    asked to be less than the rounding of the log-likelihood itself. HFLM keeps the logits of a whole batch at all positions: where
    these would take more than 256 MB in float32, the check takes smaller batches.

    Args:
        lm: The referee, on the model that `forward` runs.
        tasks: Tokenised pairs of each task.
    Returns: The difference that is largest beside its tolerance.
    Raises: RefusedError.
    """
    chosen = [_documents(task) for task in tasks]
    pairs = [task[i] for task, (members, _) in zip(tasks, chosen, strict=True) for i in members]
    try:
        ours = [
            answer
            for task, (members, _) in zip(tasks, chosen, strict=True)
            for answer in _answers(lm, forward, task, members, scorer)
        ]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError, KeyError) as error:
        # A model that takes no such mask, positions or cache raises what it likes; memory is the caller's affair.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        text = str(error).splitlines()[0][:200] if str(error) else "no message"
        raise RefusedError(f"{type(error).__name__}: {text}") from error
    bounds, dtype = bounds_of(lm), lm.model.dtype
    rows = rows_at_once(bounds, max(len(context) + len(answer) for context, answer in pairs))
    theirs = lm.referee(pairs, rows)
    if dtype in (torch.float32, torch.float64):
        spread, least, relative = None, _NATS, _NATS / 100
    else:
        others = (lm.referee(pairs, size) for size in {1, max(1, rows // 4)})
        spread = max(max(_gaps(a, b)) for a, b in combinations([theirs, *others], 2))
        least, relative = 2 * spread, torch.finfo(dtype).eps
    tolerances = [max(least, relative * abs(value)) for value, _ in theirs]
    # Where lm-eval's own numbers are not finite the weights are broken: that is said when the task is scored.
    found = [
        (gap, allowed)
        for gap, allowed, (value, _) in zip(_gaps(ours, theirs), tolerances, theirs, strict=True)
        if math.isfinite(value)
    ]
    difference, tolerance = max(found, key=lambda pair: pair[0] / max(pair[1], 1e-12), default=(0.0, least))
    if difference > tolerance:
        raise RefusedError(f"log-likelihoods differ from hflm's by up to {difference:.2g} nats, tolerance {tolerance:.2g}")
    return Check(
        scorer=scorer, documents=sum(count for _, count in chosen), max_difference=difference, tolerance=tolerance, spread=spread
    )


def rows_at_once(bounds: Bounds, longest: int) -> int:
    """Return how many rows the check hands to HFLM at once: its batch size, or as many as `LOGITS` holds."""
    return max(1, min(bounds.batch_size, LOGITS // (min(longest, bounds.max_length) * bounds.vocabulary)))


def _documents(pairs: Sequence[Pair]) -> tuple[list[int], int]:
    """Pairs of some contexts, and how many contexts these are."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(i)
    contexts = sorted(groups, key=lambda c: (-len(c) - sum(len(pairs[i][1]) for i in groups[c]), c))
    step = max(1, (len(contexts) - 1) // (_DOCUMENTS - 1))
    chosen = dict.fromkeys((*contexts[::step][: _DOCUMENTS - 1], contexts[-1]))
    return [i for context in chosen for i in groups[context]], len(chosen)


def _answers(lm: SafeHFLM, forward: Forward, task: Sequence[Pair], chosen: Sequence[int], scorer: str) -> list[Answer]:
    """The scorer's answers to some pairs of a task, with the prefix of the whole task."""
    bounds = bounds_of(lm)
    found = forward.answers(lay_out([task[i] for i in chosen], bounds, start_for(scorer, task, bounds)))
    return [found[i] for i in range(len(chosen))]


def _gaps(ours: Sequence[Answer], theirs: Sequence[Answer]) -> list[float]:
    """Differences in nats; infinite where one side alone is NaN, 0 where both are."""
    gaps = (
        0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True)
    )
    return [math.inf if math.isnan(gap) else gap for gap in gaps]

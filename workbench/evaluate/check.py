"""A scorer against lm-eval's own HFLM on a few documents of each task, before its numbers count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from workbench.evaluate.packed import Answer, Forward, Pair, lay_out, shared_start
from workbench.scores import Check

if TYPE_CHECKING:
    from workbench.evaluate.models import SafeHFLM

_DOCUMENTS = 4  # of each task
_NATS = 1e-4  # in float32, for log-likelihoods up to 100 nats; relative beyond, as float32 sums round


class RefusedError(Exception):
    """The scorer does not agree with HFLM on this model; the message says by how much, or what it raised."""


def checked(lm: SafeHFLM, forward: Forward, tasks: Sequence[Sequence[Pair]], scorer: str) -> Check:
    """Compare, on the documents of each task with the longest row and three spread over the rest.

    In float32 log-likelihoods agree to 1e-4 nats. In narrower dtypes HFLM itself gives other numbers for other batch sizes: the
    difference may be twice that spread, measured here between its batch size and 1, and is never asked to be less than
    the rounding of the log-likelihood itself.

    Args:
        lm: The referee, on the model that `forward` runs.
        tasks: Tokenised pairs of each task.
    Raises: RefusedError.
    """
    pairs: list[Pair] = []
    ours: list[Answer] = []
    documents = 0
    try:
        for task in tasks:
            chosen, count = _documents(task)
            documents += count
            found = _answers(lm, forward, task, chosen, scorer)
            pairs += [task[i] for i in chosen]
            ours += [found[i] for i in chosen]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError, KeyError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise RefusedError(
            f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
        ) from error
    theirs = lm.referee(pairs)
    difference = _largest(ours, theirs)
    whole = lm.model.dtype in (torch.float32, torch.float64)
    if whole:
        spread, tolerance = None, _NATS * max(1.0, max((abs(value) for value, _ in theirs), default=0.0) / 100)
    else:
        spread = _largest(theirs, lm.referee(pairs, 1))
        rounding = torch.finfo(lm.model.dtype).eps * max((abs(value) for value, _ in theirs), default=0.0)
        tolerance = max(2 * spread, rounding)
    if not difference <= tolerance and all(math.isfinite(value) for value, _ in theirs):
        raise RefusedError(f"log-likelihoods differ from hflm's by up to {difference:.2g} nats, tolerance {tolerance:.2g}")
    return Check(scorer=scorer, documents=documents, max_difference=difference if math.isfinite(difference) else 0.0,
                 tolerance=tolerance, spread=spread)  # fmt: skip


def _documents(pairs: Sequence[Pair]) -> tuple[list[int], int]:
    """Pairs of some contexts, and how many contexts these are."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(i)
    contexts = sorted(groups, key=lambda c: (-len(c) - sum(len(pairs[i][1]) for i in groups[c]), c))
    step = max(1, (len(contexts) - 1) // (_DOCUMENTS - 1))
    chosen = dict.fromkeys((*contexts[::step][: _DOCUMENTS - 1], contexts[-1]))
    return [i for context in chosen for i in groups[context]], len(chosen)


def _answers(lm: SafeHFLM, forward: Forward, task: Sequence[Pair], chosen: Sequence[int], scorer: str) -> dict[int, Answer]:
    """The scorer's answers to some pairs of a task, with the prefix of the whole task."""
    from workbench.evaluate.models import bounds_of

    bounds = bounds_of(lm)
    shared = shared_start(task, bounds.max_length) if scorer == "prefix" else []
    found: dict[int, Answer] = {}
    for prefix, rows in lay_out([task[i] for i in chosen], bounds, shared).batches():
        found |= {chosen[i]: answer for i, answer in forward.batch(prefix, rows).items()}
    return found


def _largest(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Largest difference; NaN on one side alone is infinite."""
    gaps = [
        0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True)
    ]
    return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)

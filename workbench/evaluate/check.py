"""Compare a scorer with lm-eval's own HFLM on a few documents before its scores count.

The whole check, on documents of each task, runs once for models that run the same code on the same requests. It is followed by a short
one for each further configuration, on the one document that costs HFLM least. Both run in float32, where the tolerance is 1e-4 nats, so
that no difference of consequence is excused by the rounding of narrower dtypes; the whole check repeats the short one in the model's own
dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, compress
from typing import TYPE_CHECKING, Any

import torch

from workbench.evaluate.packed import LOGITS, Answer, Bounds, Forward, Pair, answered, bounds_of
from workbench.ground.files import json_digest
from workbench.ground.identity import installed
from workbench.scores.store import Check
from workbench.scores.suite import SCORED_BY

if TYPE_CHECKING:
    from workbench.evaluate.hflm import SafeHFLM

# A whole check compares one document in twenty of each task. The longest and the shortest show what padding does to a row.
_SHARE, _LEAST, _MOST = 20, 2, 4
_COPY = 8e9  # largest size in bytes of a model's float32 copy that a check makes
_NATS = 1e-4  # float32 tolerance for log-likelihoods up to 100 nats; 1e-6 of the value above that


STATEFUL = "its layers pass a state from token to token, which no mask can hide from a token"
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError, KeyError)
"""Errors that the code of a model raises on requests that it does not support; lack of memory is a RuntimeError too."""


class RefusedError(Exception):
    """Exception for a scorer that does not agree with HFLM on a model; the message gives the difference or the error."""


def in_one_line(error: Exception) -> str:
    """Return an error of a model's code in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"


def alike(model: Any, tokenizer: str, tasks: Sequence[str]) -> str:
    """Return a digest of what decides how a model with a tokenizer scores some tasks of a plan, apart from its weights."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return json_digest([kind, config, tokenizer, str(model.dtype), model.device.type, sorted(tasks), installed(*SCORED_BY)])


def can_be_short(model: Any) -> bool:
    """Return True if checks run in float32, and one can be short: no router decides how rows run, and a float32 copy is small."""
    return getattr(model, "routing", None) is None and 4 * sum(p.numel() for p in model.parameters()) <= _COPY


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Run a model in float32 within the block; its own tensors come back after it."""
    own = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        for tensor, data in own:
            if data.is_floating_point():
                tensor.data = data.float()
        yield
    finally:
        for tensor, data in own:
            tensor.data = data


def checked(lm: SafeHFLM, forward: Forward, tasks: Sequence[Sequence[Pair]], scorer: str, *, short: bool = False) -> Check:
    """Compare a scorer with HFLM on documents of each task: the longest, the shortest, and others between; or on one if it is `short`.

    The scorer answers all continuations of a document in one row, as in a task; HFLM the first and the last.

    In float32, log-likelihoods agree to 1e-4 nats. In narrower dtypes, HFLM itself gives different numbers for different batch
    sizes. The tolerance is then twice the largest of those differences, measured between HFLM's batch size, a quarter of it and
    1, but at least the rounding of the log-likelihood itself and twice that of the logits, since both sides round: a logit z is
    stored to z·ε, and the errors of an answer's n tokens add up to about √n of that. HFLM keeps the logits of a whole batch at all
    positions; if these exceed 256 MB in float32, the check uses smaller batches, and its batch sizes may all be 1: the rounding of
    the logits then decides.

    Args:
        lm: HFLM on the model that `forward` runs.
        forward: The scorer's forward passes.
        tasks: Tokenized pairs of each task.
        scorer: Name of the scorer.
        short: Compare the one document of all tasks that costs HFLM least, of those with several continuations if there are any.

    Returns:
        The difference that is largest relative to its tolerance.

    Raises:
        RefusedError: If a difference exceeds its tolerance, or the model raises an error for the scorer and none for HFLM.
    """
    if getattr(getattr(lm.model, "routing", None), "whole_rows", False):
        raise RefusedError("bricks act on spans of tokens, which are told apart in whole rows only")
    if getattr(lm.model, "_is_stateful", False):
        raise RefusedError(STATEFUL)
    samples = _cheapest(tasks) if short else [(task, _documents(task)) for task in tasks]
    by_task = [(task, [task[i] for document in documents for i in document]) for task, documents in samples]
    compared = [i in _ends(document) for _, documents in samples for document in documents for i in document]
    pairs = list(compress((pair for _, chosen in by_task for pair in chosen), compared))
    try:
        answers = [answer for task, chosen in by_task for answer in answered(lm, forward, chosen, scorer, task)]
    except MODEL_ERRORS as error:
        # A model that does not support such a mask, positions or cache may raise anything; the caller handles lack of memory.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        lm.referee(pairs[:1])  # where this fails too, the model is at fault and not the scorer
        raise RefusedError(in_one_line(error)) from error
    scorer_answers = list(compress(answers, compared))
    bounds, dtype = bounds_of(lm), lm.model.dtype
    rows = rows_at_once(bounds, max(len(context) + len(answer) for context, answer in pairs))
    hflm_answers = lm.referee(pairs, rows)
    if dtype in (torch.float32, torch.float64):
        spread, least, relative, rounding = None, _NATS, _NATS / 100, 0.0
    else:
        other_batches = (lm.referee(pairs, size) for size in {1, max(1, rows // 4)})
        spread = max(max(_gaps(a, b)) for a, b in combinations([hflm_answers, *other_batches], 2))
        least, relative = 2 * spread, torch.finfo(dtype).eps
        rounding = 2 * relative * _largest_logit(lm, pairs)
    tolerances = [
        max(least, relative * abs(value), rounding * math.sqrt(len(answer)))
        for (value, _), (_, answer) in zip(hflm_answers, pairs, strict=True)
    ]
    # If lm-eval's own numbers are not finite, the weights are broken; scoring the task reports that.
    gaps = [
        (gap, allowed)
        for gap, allowed, (value, _) in zip(_gaps(scorer_answers, hflm_answers), tolerances, hflm_answers, strict=True)
        if math.isfinite(value)
    ]
    difference, tolerance = max(gaps, key=lambda pair: pair[0] / max(pair[1], 1e-12), default=(0.0, least))
    if difference > tolerance:
        raise RefusedError(f"log-likelihoods differ from hflm's by up to {difference:.2g} nats, tolerance {tolerance:.2g}")
    return Check(
        scorer=scorer,
        documents=sum(len(documents) for _, documents in samples),
        max_difference=difference,
        tolerance=tolerance,
        spread=spread,
    )


def _largest_logit(lm: SafeHFLM, pairs: Sequence[Pair]) -> float:
    """Return the largest magnitude of the logits that give the longest pair's answer."""
    from workbench.evaluate.hflm import without_recall

    context, answer = max(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    tokens = [*context, *answer][-(lm.max_length + 1) :][:-1]
    with torch.no_grad(), without_recall(lm.model):
        logits = lm._model_call(torch.tensor([tokens], device=lm.device))[0, -len(answer) :]
    return float(logits.abs().max())


def rows_at_once(bounds: Bounds, longest: int) -> int:
    """Return how many rows the check hands to HFLM at once: its batch size, or as many as `LOGITS` allows."""
    return max(1, min(bounds.batch_size, LOGITS // (min(longest, bounds.max_length) * bounds.vocabulary)))


def _by_context(pairs: Sequence[Pair]) -> list[list[int]]:
    """Return the indices of the pairs of each context, the longest first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(i)
    return [groups[c] for c in sorted(groups, key=lambda c: (-len(c) - sum(len(pairs[i][1]) for i in groups[c]), c))]


def _documents(pairs: Sequence[Pair]) -> list[list[int]]:
    """Return the indices of the pairs of the documents that a whole check compares, all of them if there are few."""
    contexts = _by_context(pairs)
    count = min(len(contexts), max(_LEAST, min(_MOST, len(contexts) // _SHARE)))
    return [contexts[i * (len(contexts) - 1) // max(count - 1, 1)] for i in range(count)]


def _ends(document: Sequence[int]) -> set[int]:
    """Return the pairs of a document that HFLM scores again: the last in the row would see all others if it could, and the first none."""
    return {document[0], document[-1]}


def _cheapest(tasks: Sequence[Sequence[Pair]]) -> list[tuple[Sequence[Pair], list[list[int]]]]:
    """Return the task and the indices of the document that HFLM forwards the fewest tokens for.

    One with several continuations is preferred, since a single one does not show that they do not see each other.
    """

    def cost(sample: tuple[Sequence[Pair], list[int]]) -> tuple[bool, int]:
        task, document = sample
        return len(document) == 1, sum(len(task[i][0]) + len(task[i][1]) for i in _ends(document))

    task, document = min(((task, document) for task in tasks for document in _by_context(task)), key=cost)
    return [(task, [document])]


def _gaps(first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
    """Return differences in nats: infinite if only one side is NaN, 0 if both are."""
    gaps = (
        0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) for (a, _), (b, _) in zip(first, second, strict=True)
    )
    return [math.inf if math.isnan(gap) else gap for gap in gaps]

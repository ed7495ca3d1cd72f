"""Costs of a configuration: length of its answers, time and memory of scoring, rate of generated text, and licenses.

A number that is not known is null, and `missing` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.compare.tables import Table
from workbench.scores.documents import TaskScores
from workbench.scores.store import Scores

OLDER = "scored by a version that did not store it"
NO_TEXT = "no task generates text"
IMPORTED = "imported scores do not record it"
ELSEWHERE = "the model was in another process"
RESUMED = "all texts are those of an interrupted evaluation"
GENERATES = "generate_until"


def costs_of(entry: Sequence[Scores], tasks: Sequence[Table]) -> dict[str, Any]:
    """Return the costs of a configuration over all suites.

    Args:
        entry: Scores of the configuration, one per suite.
        tasks: Tables of all tasks.

    Returns:
        `answer_length` (mean over generated texts) and its `length_unit` ("tokens", or "words" where tokens are not stored), `seconds`,
        `resumed` (the time leaves out what an interrupted evaluation had done), `tokens_per_second`, `peak_bytes` and `peak_of` (what it
        counts), `licences`, and `missing`: number -> reason.
    """
    scored = [about for scores in entry for about in scores.tasks.values()]
    imported = all(about.seconds is None and about.measured is None for about in scored)
    unknown = IMPORTED if imported else OLDER
    length, unit = _length(entry, scored, tasks)
    seconds = round(sum(scores.seconds for scores in entry), 2)
    rate, slow = _rate(scored, length is not None, unknown)
    peaks = [(m.peak_bytes, m.peak_of) for about in scored if (m := about.measured) and m.peak_bytes is not None]
    peak, peak_of = max(peaks, key=lambda one: one[0] or 0) if peaks else (None, None)
    licences = dict(entry[0].configuration.licences)
    known = not imported or seconds > 0
    missing = {
        "answer_length": None if length is not None else NO_TEXT,
        "seconds": None if known else IMPORTED,
        "tokens_per_second": slow,
        "peak_bytes": None if peaks else ELSEWHERE if any(about.measured for about in scored) else unknown,
        "licences": None if licences else unknown,
    }
    return {
        "answer_length": length,
        "length_unit": unit,
        "seconds": seconds if known else None,
        "resumed": any(about.measured.resumed for about in scored if about.measured),
        "tokens_per_second": rate,
        "peak_bytes": peak,
        "peak_of": peak_of,
        "licences": licences,
        "missing": {name: reason for name, reason in missing.items() if reason},
    }


def _length(entry: Sequence[Scores], scored: Sequence[TaskScores], tasks: Sequence[Table]) -> tuple[float | None, str | None]:
    """Return the mean length of generated texts and its unit: tokens if all tasks that generate store them, else words of the answers."""
    digest = entry[0].configuration.digest
    generating = [t for t in tasks if t.kind == GENERATES and digest in t.rows]
    texts = [str(row["response"]) for t in generating for row in t.rows[digest] if row.get("response") is not None]
    if not texts:
        return None, None
    counted = [(about.answers, about.answer_tokens) for about in scored if about.answers and about.answer_tokens is not None]
    if len(counted) >= len(generating):
        return sum(tokens or 0 for _, tokens in counted) / sum(answers or 0 for answers, _ in counted), "tokens"
    return sum(len(text.split()) for text in texts) / len(texts), "words"


def _rate(scored: Sequence[TaskScores], texts: bool, unknown: str) -> tuple[float | None, str | None]:
    """Return the tokens of answers per second over all tasks, or the reason why it is not known."""
    if not texts:
        return None, NO_TEXT
    measured = [about for about in scored if about.measured]
    timed = [(about.answer_tokens or 0, about.measured.tokens_per_second) for about in measured if about.measured]
    pairs = [(tokens, rate) for tokens, rate in timed if tokens and rate]
    if pairs:
        return sum(tokens for tokens, _ in pairs) / sum(tokens / rate for tokens, rate in pairs), None
    if not measured:
        return None, unknown
    return None, RESUMED if any(about.measured.resumed for about in measured if about.measured) else "no answer has a token"

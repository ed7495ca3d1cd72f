"""A configuration of a comparison: scores, mean over skills, forgetting, and what it costs in time, memory, length and licenses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from workbench.compare.differences import Effect, Verdict
from workbench.compare.kept import Kept, kept_of
from workbench.compare.leaders import pair_of
from workbench.compare.making import commands
from workbench.compare.tables import Table
from workbench.ground.results import JsonObject, Measured, Number
from workbench.scores.documents import Check, TaskScores
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS, Floats, expanded_tail
from workbench.scores.store import DESIGN_ORDER, Configuration, Scores

OLDER = "scored by a version that did not store it"
NO_TEXT = "no task generates text"
IMPORTED = "imported scores do not record it"
ELSEWHERE = "the model was in another process"
RESUMED = "all texts are those of an interrupted evaluation"
GENERATES = "generate_until"
KEYS = ("seconds", "answer_length", "tokens_per_second", "peak_bytes", "licences")
"""Fields of costs that may be unknown, in the order of tables."""


class Costs(JsonObject):
    """The costs of a configuration. A number that is not known is null, and `missing` says why."""

    answer_length: Number | None
    """Mean length of the generated texts."""
    length_unit: Literal["tokens", "words"] | None
    """Unit of `answer_length`: tokens of the model's tokenizer, or words where the stored scores have no tokens."""
    seconds: Number | None
    """Time of scoring all tasks."""
    resumed: bool
    """True if the time leaves out what an interrupted evaluation had done."""
    tokens_per_second: Number | None
    """Tokens of the generated texts per second of generating them."""
    peak_bytes: int | None
    """Largest peak of memory while a task was scored."""
    peak_of: str | None
    """The memory that `peak_bytes` counts: CUDA memory that torch allocated, or resident memory of the process."""
    licences: dict[str, str]
    """License of the base and of every brick; "unknown" if none is stated; empty for imported scores."""
    missing: dict[str, str]
    """Field -> reason why it is null or empty."""


class _Of(JsonObject):
    configuration: str
    """Name of the configuration."""


class ConfigurationCosts(Costs, _Of):
    """The costs of a configuration. A number that is not known is null, and `missing` says why."""


def costs_of(entry: Sequence[Scores], tasks: Sequence[Table]) -> Costs:
    """Return the costs of a configuration over all suites.

    Args:
        entry: Scores of the configuration, one per suite.
        tasks: Tables of all tasks.
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
    return Costs(
        answer_length=length,
        length_unit=unit,
        seconds=seconds if known else None,
        resumed=any(about.measured.resumed for about in scored if about.measured),
        tokens_per_second=rate,
        peak_bytes=peak,
        peak_of=peak_of,
        licences=licences,
        missing={name: reason for name, reason in missing.items() if reason},
    )


def _length(
    entry: Sequence[Scores], scored: Sequence[TaskScores], tasks: Sequence[Table]
) -> tuple[float | None, Literal["tokens", "words"] | None]:
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


class Level(JsonObject):
    """A score or a mean of scores with its 95 % interval."""

    value: Measured
    """The level; null if it is undefined."""
    low: Measured
    """Lower end of the interval."""
    high: Measured
    """Upper end of the interval."""


class Score(Level):
    """A configuration's score on one task."""

    corrected: Measured = None
    """The score corrected for chance; null if it is no share of right answers or the chance score is not known."""
    n: int
    """Number of items."""


class ComparedConfiguration(JsonObject):
    """A configuration of a comparison: what it is, its scores, and what it keeps of its parents' skill."""

    name: str
    """Name of the configuration."""
    role: str
    """"configuration" for a named one; "base", "brick", "average", "memory", "finetune" or "adapter" for a control."""
    digest: str
    """Identity of its weights, generation settings and tokenizer."""
    parents: tuple[str, ...]
    """Bricks that it is made from."""
    recipe: str | None
    """Path of its recipe, relative to the project."""
    recipe_text: str | None
    """Text of its recipe, if the file is there."""
    roles: list[str] = []
    """Its role and the roles of its aliases: a recipe can also be the plain average."""
    aliases: list[str]
    """Other names of the same weights."""
    seconds: Number
    """Time of scoring all tasks."""
    mean: Level | None
    """Mean over skills, corrected for chance."""
    kept: dict[str, Kept]
    """Task -> share of the best parent's skill that it keeps."""
    kept_mean: Kept | None
    """The same over all these tasks."""
    forgetting: Effect | None
    """Mean difference from the base over the retention tasks; null for the base and without such tasks."""
    parameters: int | None
    """Number of parameters."""
    bytes: int | None
    """Size of the weights as a checkpoint."""
    form: str | None = None
    """Form in which `run` writes it."""
    written: int | None = None
    """Bytes that `run` writes."""
    bricks: dict[str, int | None]
    """Brick -> bytes of its files."""
    axes: dict[str, dict[str, str]] = {}
    """Brick -> axis -> value, from the bricks' cards."""
    check: list[Check | None]
    """Check of the scorer, one for each suite."""
    scores: dict[str, Score]
    """Task -> score."""
    costs: Costs
    """Length of answers, time and memory of scoring, licenses."""
    command: list[str] = []
    """Command lines that make it and use the result; empty if only its scores are known."""

    @property
    def is_control(self) -> bool:
        """True for the base, a brick alone, an average, and another way to teach an edit's facts."""
        return self.role != "configuration"

    @property
    def level(self) -> float:
        """Mean over skills; minus infinity if there is none."""
        return -math.inf if self.mean is None or self.mean.value is None else self.mean.value


def summary(
    entry: Sequence[Scores],
    tasks: Sequence[Table],
    entries: Sequence[Sequence[Scores]],
    root: Configuration | None,
    recipe_text: str | None,
) -> ComparedConfiguration:
    """Return a configuration's scores with intervals, mean over skills, kept skill of its parents and forgetting.

    Args:
        entry: Scores of the configuration, one per suite.
        tasks: Tables of all tasks.
        entries: Scores of all configurations, to find the parents.
        root: The base, for forgetting.
        recipe_text: Text of the recipe, if it is known.
    """
    c = entry[0].configuration
    tables = [t for t in tasks if c.digest in t.values]
    scores = {}
    for t in tables:
        low, high = t.interval(c.digest)
        value = t.value(c.digest)
        corrected = float(t.corrected(value)) if t.correctable and t.chance is not None else None
        scores[t.name] = Score(value=value, low=low, high=high, corrected=corrected, n=len(t.items))
    digests = {name: e[0].configuration.digest for e in entries for s in e for name in s.names}
    kept, kept_mean = kept_of(tables, c, {n: digests[n] for n in c.parents if digests.get(n, c.digest) != c.digest})
    return ComparedConfiguration(
        name=c.name,
        role=c.role,
        digest=c.digest,
        parents=tuple(c.parents),
        recipe=c.recipe,
        recipe_text=recipe_text,
        roles=roles_of(entry),
        aliases=sorted({n for s in entry for n in s.names} - {c.name}),
        seconds=round(sum(s.seconds for s in entry), 2),
        mean=mean_score([t for t in tables if t.skill], c.digest),
        kept=kept,
        kept_mean=kept_mean,
        forgetting=forgetting(tables, root, c) if root else None,
        parameters=c.parameters,
        bytes=c.bytes,
        form=c.form,
        written=c.written,
        bricks=dict(c.bricks),
        axes={brick: dict(axes) for brick, axes in c.axes.items()},
        check=[s.check for s in entry],
        scores=scores,
        costs=costs_of(entry, tasks),
        command=commands(c),
    )


def roles_of(entry: Sequence[Scores]) -> list[str]:
    """Return a configuration's role and the roles of its aliases, in design order."""
    roles = {entry[0].configuration.role, *(alias.role for s in entry for alias in s.aliases)}
    return [role for role in DESIGN_ORDER if role in roles]


def with_twins(entries: Sequence[Sequence[Scores]], scores: Sequence[Scores]) -> list[list[Scores]]:
    """Return the configurations, and after each one the recipes and models with the same weights under their own names."""
    displayed = []
    for entry in entries:
        displayed.append(list(entry))
        first = entry[0].configuration
        if first.role == "configuration":
            others = {s.configuration.name: s.configuration for s in scores if s.configuration.role == "configuration"}
            displayed += [
                [s.called(c) for s in entry] for c in others.values() if c.digest == first.digest and c.name != first.name
            ]
    return displayed


def mean_score(tasks: Sequence[Table], digest: str) -> Level | None:
    """Return the mean chance-corrected score over tasks, with its 95 % interval.

    Clusters are resampled within tasks; the percentiles are expanded to the t quantile of the task with the fewest effective clusters
    (Hesterberg 2015, expanded percentile).

    If a task has fewer than 20 clusters, or equal scores on all items so that resampling shows no spread, the interval is the root of the
    summed squares of the tasks' own intervals.
    """
    if not tasks:
        return None
    value = float(np.mean([t.corrected(t.values[digest].mean()) for t in tasks]))
    if all(t.clusters >= MANY_CLUSTERS and np.ptp(t.values[digest]) > 0 for t in tasks):
        low, high = _expanded(np.mean([t.resampled[digest] for t in tasks], axis=0), tasks)
        return Level(value=value, low=low, high=high)
    ends = [(t.values[digest].mean(), *t.interval(digest), t.span) for t in tasks]
    down = math.sqrt(sum(((v - low) / scale) ** 2 for v, low, _, scale in ends)) / len(tasks)
    up = math.sqrt(sum(((high - v) / scale) ** 2 for v, _, high, scale in ends)) / len(tasks)
    return Level(value=value, low=value - down, high=value + up)


def forgetting(tasks: Sequence[Table], root: Configuration, c: Configuration) -> Effect | None:
    """Return the mean difference of chance-corrected scores from the base over the retention tasks; negative values mean forgetting.

    One test and its 95 % interval cover the clusters of all tasks, outside the families. The verdict is "safe" if a loss as large
    as the tasks' mean tolerance, which is corrected for chance like the scores, is excluded as for a guarded task.
    """
    retention = [
        t for t in tasks if t.suite.role_of(t.task) == "retention" and t.correctable and {root.digest, c.digest} <= set(t.values)
    ]
    if not retention or c.digest == root.digest:
        return None
    pair, drawn = (pair_of(retention, c.digest, root.digest, drawn=drawn) for drawn in (False, True))
    low, high = pair.interval(0.05)
    tolerance = float(np.mean([(t.tolerance or 0.0) / t.span for t in retention]))
    verdict: Verdict = "no item changed" if pair.unchanged else "not shown safe"
    if min(t.clusters for t in retention) >= FEW_CLUSTERS:
        if low > -tolerance and drawn.excludes(tolerance, -1, 0.025):
            verdict = "safe"
        elif high < 0:
            verdict = "worse"
    return Effect(diff=pair.diff, low=low, high=high, verdict=verdict)


def _expanded(draws: Floats, tasks: Sequence[Table]) -> tuple[float, float]:
    """Return the 95 % percentiles of draws, expanded for the task with the fewest effective clusters."""
    tail = expanded_tail(0.025, min(t.effective for t in tasks))
    low, high = (float(x) for x in np.quantile(draws, (tail, 1 - tail)))
    return low, high

"""The decision behind a recommendation, and its sentences: what to ship and why, what stands beside it, what would help if nothing can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from workbench.compare.differences import Difference
from workbench.compare.kept import Kept
from workbench.compare.leaders import MOST_MEMBERS, MeanDifference
from workbench.ground.errors import shell, size
from workbench.ground.numbers import about as rounded_up
from workbench.ground.numbers import count, few, figures, fixed, listed, plural, signed
from workbench.ground.results import JsonObject, Number

CANDIDATES = ("base", "brick", "average", "configuration")
"""Roles of candidates. The other controls (facts in the prompt, fine-tuning, an adapter) are made for a comparison and are not shipped."""
CandidateRole = Literal["configuration", "brick", "average", "base"]
Guarded = Literal["safe", "not shown safe", "worse", "no guarded task", "baseline"]
Cause = Literal["unsafe", "not shown safe", "not better", "too few clusters", "no mean", "not scored", "same weights"]
UNGUARDED: Guarded = "no guarded task"
BASELINE: Guarded = "baseline"
_SHIPPABLE = ("safe", UNGUARDED, BASELINE)
_CLEARLY = 0.9  # a result counts as smaller if it has less than this share of the other one's bytes


class Candidate(JsonObject):
    """A configuration, brick, average or base that was scored on all skill tasks."""

    configuration: str
    """Name of the configuration."""
    role: CandidateRole
    """Its role; bricks, averages and the base are controls."""
    mean: Number
    """Mean over skills, corrected for chance."""
    guarded: Guarded
    """Its worst verdict over all guarded tasks, or why it has none."""
    against_baseline: MeanDifference | None
    """Difference from the baseline; null for the baseline itself."""
    against_best: MeanDifference | None
    """Difference from the candidate with the highest mean; null for that one."""
    form: str | None
    """Form in which `run` writes it: "checkpoint", "adapter" or "configuration"; null if not known."""
    bytes: int | None
    """Bytes that `run` writes, or those of the weights as a checkpoint; null if not known."""
    bricks: int
    """Number of bricks that it is made from."""

    @property
    def better(self) -> bool:
        """True if it is better than the baseline, or is the baseline."""
        return self.against_baseline is None or self.against_baseline.verdict == "better"

    @property
    def recommendable(self) -> bool:
        """True if it is better than the baseline and safe on every guarded task."""
        return self.better and self.guarded in _SHIPPABLE

    def cheaper(self, other: Candidate) -> str:
        """Return in which way it costs less than another candidate, as a predicate; empty if it does not.

        Bytes count first, if they differ by a tenth or more; then the number of bricks.
        """
        if self.bytes is not None and other.bytes is not None:
            if self.bytes < _CLEARLY * other.bytes:
                return f"smaller ({size(self.bytes)} against {size(other.bytes)})"
            if other.bytes < _CLEARLY * self.bytes:
                return ""
        if 0 < self.bricks < other.bricks:
            return f"made from fewer bricks ({self.bricks} against {other.bricks})"
        return ""


@dataclass(frozen=True)
class Decision:
    """The recommended configuration, or why there is none.

    Attributes:
        baseline: Name of the baseline.
        chosen: The recommended candidate, if there is one.
        closest: The candidate that misses least, if none is recommended.
        cause: Why none is recommended, whose clause stands in `advice.py`.
        ranked: All candidates, the highest mean first.
        alpha: Error rate of the families of pairs.
        leaders: Names of the leaders, the highest mean first.
        beside: Differences from the chosen, or closest, candidate of the other leaders and of all that are not shown to be worse than it.
        equal_to: Name of the candidate with the highest mean to which the chosen one is equivalent, if it is another one.
        unsafe: Candidate -> its rows of guarded tasks on which it is worse or not shown safe.
        lost: Candidate -> tasks that are not guarded and on which it is worse than the baseline.
        outside: Candidate -> its rows of skill tasks on which it is worse and whose metric cannot enter the mean, such as bits per byte.
        harmful: Guarded task -> bricks that are worse on it alone.
        guarded: Names of the guarded tasks.
        skills: Names of the tasks of the mean.
        items: Number of their items.
        clusters: Number of clusters of these items.
        controls: Controls that are no candidates -> mean over skills.
        members: Number of members of the families of pairs: candidates, baseline, and what was looked at before.
        pairs: Number of their pairs.
        looked_at: Number of members that were looked at before on the same items and are not in the comparison.
    """

    baseline: str
    chosen: Candidate | None = None
    closest: Candidate | None = None
    cause: Cause | None = None
    ranked: tuple[Candidate, ...] = ()
    alpha: float = 0.05
    leaders: tuple[str, ...] = ()
    beside: tuple[MeanDifference, ...] = ()
    equal_to: str | None = None
    unsafe: Mapping[str, Sequence[Difference]] = field(default_factory=dict)
    lost: Mapping[str, Sequence[str]] = field(default_factory=dict)
    outside: Mapping[str, Sequence[Difference]] = field(default_factory=dict)
    harmful: Mapping[str, Sequence[str]] = field(default_factory=dict)
    guarded: tuple[str, ...] = ()
    skills: tuple[str, ...] = ()
    items: int = 0
    clusters: int = 0
    controls: Mapping[str, float] = field(default_factory=dict)
    members: int = 0
    pairs: int = 0
    looked_at: int = 0


NONE = "No configuration can be recommended"
KEEPS = 0.95
"""Share of its bricks' skills that a merge is expected to keep; one that is shown to keep less gets a sentence."""
_ALONE = {
    "base": "the base: nothing has to be written",
    "brick": "a brick alone: nothing has to be merged",
    "average": "the average of the bricks, scored as a control",
}
"""Role of a control that is recommended -> what it is."""
_NAMED = 3  # configurations beside the recommended one that get a sentence each


def headline(decision: Decision) -> str:
    """Return one sentence: what to ship with its reason, or that nothing can be recommended with the cause."""
    if decision.chosen is None:
        return f"{NONE}: {_cause(decision)}."
    s = decision.chosen
    if decision.equal_to:
        other = next(o for o in decision.ranked if o.configuration == decision.equal_to)
        first = f"equivalent to {other.configuration}, which has the highest mean, and {s.cheaper(other)}"
    elif len(decision.ranked) == 1:
        first = f"mean over skills {fixed(100 * s.mean, 1)}"
    elif s is decision.ranked[0]:
        first = f"highest mean over skills, {fixed(100 * s.mean, 1)}"
    else:
        first = f"highest mean over skills of those that can be recommended, {fixed(100 * s.mean, 1)}"
    parts = [first]
    if s.against_baseline:
        parts.append(f"{_gap(s.against_baseline)} against {decision.baseline}")
    if s.guarded == BASELINE:
        parts.append("it is the baseline")
    elif s.guarded == UNGUARDED:
        parts.append("no guarded task tests for harm")
    else:
        parts.append(f"safe on {listed(decision.guarded) if len(decision.guarded) <= _NAMED else 'every guarded task'}")
    if outside := decision.outside.get(s.configuration):
        parts.append(f"but worse on what this mean leaves out: {listed(map(_moved, outside))}")
    return f"Ship {s.configuration}: {'; '.join(parts)}."


def details(decision: Decision) -> list[str]:
    """Return sentences on the configurations beside the chosen, or closest, one."""
    about = decision.chosen or decision.closest
    if about is None:
        return []
    sentences = []
    if decision.chosen and (what := _ALONE.get(about.role)):
        sentences.append(f"{about.configuration} is {what}.")
    outside = {row.task for row in decision.outside.get(about.configuration, ())}
    if decision.chosen and (lost := [task for task in decision.lost[about.configuration] if task not in outside]):
        sentences.append(
            f"{about.configuration} is worse than {decision.baseline} on {listed(lost)}, although its mean is higher."
        )
    by_name = {s.configuration: s for s in decision.ranked}
    higher = [s for s in decision.ranked if s.mean > about.mean and s.configuration != decision.equal_to]
    sentences += [
        f"{s.configuration} has a higher mean, {fixed(100 * s.mean, 1)}, but {_failing(s, decision)}." for s in higher[:_NAMED]
    ]
    named = {s.configuration for s in higher}
    near = [
        d
        for d in decision.beside
        if d.configuration not in named and d.verdict in ("cannot tell", "equivalent", "no item changed")
    ]
    sentences += [_beside(d, by_name[d.configuration], about, decision) for d in near[:_NAMED]]
    if rest := near[_NAMED:]:
        others = f"{len(rest)} more are" if len(rest) > 1 else f"{rest[0].configuration} is"
        sentences.append(f"{others} not shown to be worse than {about.configuration} either.")
    above = [name for name, mean in decision.controls.items() if decision.chosen and mean > about.mean]
    if above:
        verb, those = (
            ("has a higher mean", "It is no candidate") if len(above) == 1 else ("have higher means", "They are no candidates")
        )
        shown = listed(f"{name} ({fixed(100 * decision.controls[name], 1)})" for name in above)
        word = "control" if len(above) == 1 else "controls"
        sentences.append(f"The {word} {shown} {verb}. {those}: name a recipe that makes the same weights to have it tested.")
    if decision.members > MOST_MEMBERS:
        sentences.append(
            f"The {decision.members} configurations are not tested against each other, which is done for {MOST_MEMBERS} at most: others may "
            "be as good."
        )
    elif decision.chosen and not near and any(other.mean < about.mean for other in decision.ranked):
        sentences.append(f"Every other configuration with a lower mean is shown to be worse than {about.configuration}.")
    if len(decision.leaders) > 2 and decision.members <= MOST_MEMBERS:
        sentences.append(
            f"The best of all is one of {len(decision.leaders)}, at {fixed(100 * (1 - decision.alpha), 0)} %: {few(decision.leaders)}."
        )
    if decision.chosen and about.against_baseline and decision.skills:
        sentences.append(_for_whom(decision, about.against_baseline))
    if decision.looked_at:
        sentences.append(counted(decision.looked_at, len(decision.ranked)))
    return sentences


def _for_whom(decision: Decision, against: MeanDifference) -> str:
    """Return for which items the recommendation is shown, and against which unseen ones it does not hold, as a sentence."""
    tasks = listed(decision.skills) if len(decision.skills) <= _NAMED else f"{len(decision.skills)} tasks"
    text = f"This is shown for items like the {count(decision.items)} of {tasks}, in {plural(decision.clusters, 'cluster')}"
    if against.stands_up_to is None:
        return f"{text}."
    return f"{text}, unless one that was not drawn falls by {fixed(100 * against.stands_up_to, 1)} points or more."


def counted(looked: int, shown: int) -> str:
    """Return why configurations that are not named count, as a sentence.

    Args:
        looked: Number of configurations that were scored on the same items and are not in the comparison.
        shown: Number of candidates in it.
    """
    others = "1 other configuration was" if looked == 1 else f"{looked} others were"
    counts = "counts" if looked == 1 else "count"
    return (
        f"{others} scored on these items and {counts} in the tests, because the best of {looked + shown} looks better by chance "
        "(`workbench scores ls` lists them)."
    )


def merge_loses(name: str, recipe: str, kept: Kept) -> list[str]:
    """Return a sentence if a merge is shown to keep less than most of its bricks' skills.

    Args:
        name: Name of the merged configuration.
        recipe: Its recipe.
        kept: Share that it keeps, with the ends of its interval.
    """
    if kept.value is None or kept.low is None or kept.high is None or kept.high >= KEEPS:
        return []
    ends = f"{100 * kept.value:.0f} [{100 * kept.low:.0f}, {100 * kept.high:.0f}] %"
    command = shell("workbench", "brick", "advise", recipe)
    return [
        f"{name} keeps {ends} of what its bricks score alone: `{command}` tells whether they overlap or contradict each other."
    ]


def helped(decision: Decision) -> list[str]:
    """Return sentences on what would help; empty if a configuration is recommended."""
    if decision.closest is None:
        return _helped_without(decision)
    s = decision.closest
    if decision.cause == "not shown safe":
        return [_shown_by(row) for row in decision.unsafe[s.configuration]] or ["Score it on every guarded task."]
    if decision.cause == "unsafe":
        tasks = [row.task for row in decision.unsafe[s.configuration] if row.verdict == "worse"]
        if task := next((t for t in tasks if decision.harmful.get(t)), None):
            bricks = decision.harmful[task]
            verb, what, those = ("is", "its weight", "it") if len(bricks) == 1 else ("are", "their weights", "them")
            return [f"Alone, {listed(bricks)} {verb} worse on {task} too: lower {what} or leave {those} out."]
        return ["Lower the weights (lambda) of its merge, or leave out bricks one at a time to find the one that harms."]
    if decision.cause == "too few clusters":
        return ["Items in more clusters, such as from more templates or passages; more items of the same clusters do not help."]
    if s.against_baseline is None or s.against_baseline.diff <= 0:
        return ["More items would hardly change this: try other methods, weights or bricks, for example with `workbench search`."]
    if s.against_baseline.needs:
        return [
            f"About {rounded_up(s.against_baseline.needs)} items over the skill tasks would show a difference as large as {signed(100 * s.against_baseline.diff, 1)} points."
        ]
    return ["More items, from more templates or passages."]


def _helped_without(decision: Decision) -> list[str]:
    """Return what would help if no candidate was tested."""
    return {
        "no mean": ["Give the suite a task with the role `skill` whose scores lie between 0 and 1."],
        "not scored": ["Score the configurations on every suite: `workbench eval`."],
        "same weights": ["Check that the steps of the recipes use the bricks and that no weight is 0."],
    }.get(decision.cause or "", [])


def _cause(decision: Decision) -> str:
    """Return the cause as a clause."""
    s, base = decision.closest, decision.baseline
    if s is None:
        return {
            "no mean": "the suite has no skill task whose scores can be averaged",
            "not scored": "none has scores on all skill tasks",
            "same weights": f"all have the weights of {base}",
        }[decision.cause or "no mean"]
    if decision.cause in ("unsafe", "not shown safe"):
        place = "has the highest mean" if s is decision.ranked[0] else f"is the best of those that are better than {base}"
        return f"{s.configuration} {place}, {fixed(100 * s.mean, 1)}, but {_failing(s, decision)}"
    if decision.cause == "too few clusters":
        why = s.against_baseline.reason if s.against_baseline else ""
        return f"these items cannot show whether {s.configuration} is better than {base} ({_short(why or '')})"
    if s.against_baseline is not None and s.against_baseline.diff > 0:
        return f"none is shown to be better than {base}; {s.configuration} comes closest, {_gap(s.against_baseline)}"
    gap = f", {_gap(s.against_baseline)}" if s.against_baseline and s.against_baseline.verdict != "no item changed" else ""
    return f"none has a higher mean over skills than {base}; {s.configuration} comes closest{gap}"


def _moved(row: Difference) -> str:
    """Return a row's task and metric with both scores, such as "wiki (bits_per_byte 1.1 → 2.2)"."""
    before, after = (figures(value or 0.0, 3) for value in (row.baseline_value, row.value))
    return f"{row.task} ({row.metric} {before} \N{RIGHTWARDS ARROW} {after})"


def _short(reason: str) -> str:
    """Return a reason up to its first colon, unless this names the number of clusters."""
    return reason if reason.startswith("too few clusters") else reason.split(":")[0]


def _failing(s: Candidate, decision: Decision) -> str:
    """Return why a candidate cannot be recommended, as a predicate."""
    worse = [row for row in decision.unsafe[s.configuration] if row.verdict == "worse"]
    if worse:
        return f"is worse than {decision.baseline} on {listed(_loss(row) for row in worse)}"
    if s.guarded == "not shown safe":
        return (
            f"is not shown safe on {listed(_doubt(row) for row in decision.unsafe[s.configuration])}"
            if decision.unsafe[s.configuration]
            else "was not scored on every guarded task"
        )
    why = f" ({_short(s.against_baseline.reason)})" if s.against_baseline and s.against_baseline.reason else ""
    return f"is not shown to be better than {decision.baseline}{why}"


def _loss(row: Difference) -> str:
    return f"{row.task} ({_own(row, row.diff or 0.0, sign=True)})"


def _doubt(row: Difference) -> str:
    """Return a guarded task with the loss that its interval includes, or with what else keeps it from being safe."""
    if row.tolerance is None or row.worst is None:
        return row.task
    if row.reason and (row.worst < row.tolerance or row.reason.startswith("too few")):  # the interval is not what is in the way
        return f"{row.task} ({row.reason})"
    return f"{row.task} (a loss of up to {_own(row, row.worst)} is possible, the tolerance is {_own(row, row.tolerance)})"


def _shown_by(row: Difference) -> str:
    """Return what would show that a guarded task is safe."""
    if row.tolerance is None:
        return f"Give {row.task} a tolerance in the suite, in the metric's units; decide it before you look at more scores."
    if (row.reason or "").startswith("too few clusters"):
        return f"On {row.task}, items from more templates or passages: {row.clusters} clusters are too few for a verdict."
    if row.needed:
        return f"About {rounded_up(row.needed)} items of {row.task} would show that a loss as large as the observed one is safe."
    return f"The observed loss on {row.task} is as large as its tolerance: more items would hardly show it to be safe."


def _beside(d: MeanDifference, other: Candidate, about: Candidate, decision: Decision) -> str:
    """Return a sentence on a configuration that is not shown to be worse."""
    relation = {"equivalent": "is equivalent to it", "no item changed": "answers every item alike"}.get(
        d.verdict, "is not distinguishable from it"
    )
    facts = [] if d.verdict == "no item changed" else [_gap(d)]
    if d.verdict == "cannot tell" and d.needs:
        facts.append(f"about {rounded_up(d.needs)} items would tell")
    text = f"{d.configuration} {relation}" + (f" ({'; '.join(facts)})" if facts else "")
    if other.guarded in ("worse", "not shown safe"):
        return f"{text}, but {_failing(other, decision)}."
    if other.cheaper(about):
        return f"{text} and is {other.cheaper(about)}."
    return f"{text}."


def _gap(d: MeanDifference) -> str:
    low, high = -math.inf if d.low is None else d.low, math.inf if d.high is None else d.high
    return f"{signed(100 * d.diff, 1)} [{signed(100 * low, 1)}, {signed(100 * high, 1)}] points"


def _own(row: Difference, value: float, *, sign: bool = False) -> str:
    """Return a difference in points for shares, else in the metric's units."""
    share = not row.ratio and not row.lower and all(v is not None and 0 <= v <= 1 for v in (row.value, row.baseline_value))
    if share:
        return f"{(signed if sign else fixed)(100 * value, 1)} points"
    return figures(value, 3, plus=sign)

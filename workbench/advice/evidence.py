"""Evidence on merges of some bricks: accuracies on their own prompts, what they decide, and stored scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from workbench.compare.leaders import mean_over
from workbench.compare.tables import Table, suites_of, tables_of
from workbench.facts.facts import SLOT
from workbench.ground.errors import size
from workbench.ground.results import JsonObject, Number
from workbench.models.texts import Text, longest_row
from workbench.scores.paired import Paired, paired
from workbench.scores.statistics import Floats, score_interval
from workbench.scores.store import Scores, ScoreStore, plan_record, stored_in

ITEMS = 24
"""Largest number of prompts of each brick, evenly spaced over its texts."""
LEAST_ITEMS = 8
"""Smallest number of prompts of each brick."""
LONGEST = 2048
"""Largest number of bytes of a prompt with its answer: no tokenizer makes more tokens of it, and the base must have as many positions."""
LEVEL = 0.05
TOKENS, TIMED = 8, 8
"""Number of tokens that are written, and of prompts that are timed, for the price of a route."""


class Interval(JsonObject):
    """A number with its interval."""

    value: Number
    """The number."""
    low: Number
    """Lower end of the interval."""
    high: Number
    """Upper end of the interval."""


class Accuracy(Interval):
    """Share of prompts that a model answers exactly, with its 95 % interval."""

    @staticmethod
    def of(right: Floats) -> Accuracy:
        """Return the accuracy of right (1) and wrong (0) answers."""
        low, high = score_interval(right, np.arange(right.size))
        return Accuracy(value=float(right.mean()), low=low, high=high)

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} [{100 * self.low:.0f}, {100 * self.high:.0f}]"


class Change(Interval):
    """Difference of two accuracies on the same prompts, with the interval at the level of its family."""

    @staticmethod
    def of(pair: Paired, family: int) -> Change:
        """Return a difference that is one of several (Bonferroni)."""
        low, high = pair.interval(LEVEL / max(1, family))
        return Change(value=pair.diff, low=low, high=high)

    @property
    def clear(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if self.value == self.low == self.high:
            return "the same answers"  # an interval of no width would claim more than the prompts show
        return f"{100 * self.value:+.0f} [{100 * self.low:+.0f}, {100 * self.high:+.0f}] points"


class OnBrick(JsonObject):
    """A model on the prompts of one brick."""

    brick: str
    """The brick."""
    accuracy: Accuracy
    """Share of its prompts that the model answers exactly, with a 95 % interval."""


def on_bricks(right: Mapping[str, Floats]) -> list[OnBrick]:
    """Return the accuracy on each brick's prompts."""
    return [OnBrick(brick=name, accuracy=Accuracy.of(values)) for name, values in right.items()]


class Tried(JsonObject):
    """A model that was run on the bricks' prompts."""

    name: str
    """Its name."""
    step: dict[str, object] | None
    """The step that makes it from the base; null for the base."""
    accuracy: Accuracy
    """Share of all prompts that it answers exactly, with a 95 % interval."""
    bricks: list[OnBrick]
    """The same on the prompts of each brick."""


class Fall(JsonObject):
    """A brick whose skill falls in the advised merge."""

    brick: str
    """The brick."""
    change: Change
    """Accuracy of the merge minus that of the brick alone, with an interval at 5 % over all bricks (Bonferroni)."""


class RoutePrice(JsonObject):
    """Price of a route beside one merge, which runs like the base."""

    adapters: int
    """Number of adapters that stand beside the base."""
    bytes: int
    """Their size."""
    seconds: Number
    """Time to read a prompt and to write 8 tokens, the median over 8 prompts, one at a time."""
    merged_seconds: Number
    """The same without router and adapters."""

    def __str__(self) -> str:
        return (
            f"the route holds {self.adapters} adapters ({size(self.bytes)}) beside the base and takes {self.seconds:.2g} s to read a prompt and to "
            f"write {TOKENS} tokens; a merge takes {self.merged_seconds:.2g} s"
        )


class Trial(JsonObject):
    """Models that were run, with --measure."""

    items: int
    """Number of prompts of each brick."""
    base: Tried
    """The base."""
    alone: list[OnBrick]
    """Each brick alone on its own prompts."""
    candidates: list[Tried]
    """Merges of the bricks, and a route between the groups if the best merge loses a skill; empty if there is nothing to try."""
    advised: str | None
    """Name of the advised candidate; null if no merge is recommended."""
    clear: bool
    """True if the prompts decide between the best candidate and the next or the one that the weights suggest."""
    says: str | None
    """The decision as a sentence; null without candidates."""
    falls: list[Fall]
    """Bricks whose skill clearly falls in the best merge."""
    price: RoutePrice | None
    """Price of the route; null if none was tried."""


@dataclass(frozen=True)
class Candidate:
    """A model that was run, with its single answers.

    Attributes:
        name: Its name.
        step: The step that makes it from the base; None for the base.
        right: Brick -> for each of its prompts, 1 if the answer is exact, else 0.
    """

    name: str
    step: Mapping[str, object] | None
    right: Mapping[str, Floats]

    @property
    def all(self) -> Floats:
        """The answers to all prompts; every brick has equally many."""
        return np.concatenate(list(self.right.values()))

    def on(self, bricks: Iterable[str]) -> Candidate:
        """Return the candidate with the answers to the prompts of some bricks."""
        return replace(self, right={name: self.right[name] for name in bricks})

    def tried(self) -> Tried:
        """Return its accuracies."""
        step = None if self.step is None else dict(self.step)
        return Tried(name=self.name, step=step, accuracy=Accuracy.of(self.all), bricks=on_bricks(self.right))


class Verdict(NamedTuple):
    """The advised candidate: its name, whether the prompts decide, and the decision as a sentence."""

    name: str
    clear: bool
    says: str


def prompts_of(texts: Sequence[Text], config: Mapping[str, object]) -> list[Text]:
    """Return the texts that a base can be asked: short ones with a prompt, of which a slot for a subject is no part."""
    longest = longest_row(config, LONGEST)
    return [t for t in texts if t.prompt and SLOT not in t.prompt and len(f"{t.prompt} {t.answer}".encode()) < longest]


def falls(alone: Mapping[str, Floats], merged: Candidate) -> dict[str, Change]:
    """Return brick -> difference for each brick that answers clearly less of its prompts in a merge than alone."""
    changes = {
        name: Change.of(paired(alone[name], right), len(merged.right)) for name, right in merged.right.items() if name in alone
    }
    return {name: change for name, change in changes.items() if change.high < 0}


def weak(base: Candidate, alone: Mapping[str, Floats]) -> dict[str, Change]:
    """Return brick -> difference from the base, for each brick that is not shown better than the base on its own prompts."""
    changes = {name: Change.of(paired(base.right[name], right), 1) for name, right in alone.items()}
    return {name: change for name, change in changes.items() if change.low <= 0}


def decide(candidates: Sequence[Candidate], suggested: str) -> Verdict:
    """Choose between candidates: the best if it is clearly better than the suggested one, which is kept otherwise."""
    by_name = {candidate.name: candidate for candidate in candidates}
    ranked = sorted(candidates, key=lambda c: (-c.all.mean(), c.name != suggested))
    best = ranked[0]
    other = ranked[1] if best.name == suggested else by_name[suggested]
    change = Change.of(paired(other.all, best.all), len(candidates) - 1)
    text = f"{best.name} answers {Accuracy.of(best.all)} % of the prompts, {other.name} {Accuracy.of(other.all)} %: {change}"
    if change.clear:
        return Verdict(best.name, True, f"Measured: {text}.")
    return Verdict(suggested, False, f"{text}, so that {best.all.size} prompts cannot tell which one is better.")


MOST = 3
"""Largest number of configurations of a suite that are shown."""


class ScoredBefore(JsonObject):
    """A stored configuration that was made from the same bricks."""

    suite: str
    """The suite."""
    name: str
    """Name of the configuration."""
    recipe: str | None
    """Path of its recipe; null for a control."""
    settings: str | None = None
    """Methods of its steps with their settings; null if they were not stored."""
    value: Number
    """Mean over the skill tasks, corrected for chance, as in reports."""
    tasks: int
    """Number of skill tasks."""
    items: int
    """Number of items of these tasks."""
    of: int
    """Number of stored configurations of these bricks on the suite."""


def scored_before(store: ScoreStore, sizes: Mapping[str, int]) -> list[ScoredBefore]:
    """Return the best stored configurations that were made from exactly these bricks, suite by suite.

    A configuration counts if its bricks have the same names and the same sizes on disk. Plans with a limit on items, imported plans and
    suites without a skill task do not count. Only the newest plan of a suite is read.

    Args:
        store: The score store.
        sizes: Brick -> bytes on disk.

    Raises:
        WorkbenchError: If a stored document is damaged.
    """
    newest: dict[str, tuple[str, list[ScoredBefore]]] = {}
    for path in sorted(store.root.glob("*/plan.json")):
        plan = plan_record(path.parent)
        if plan.partial or plan.imported:
            continue
        stored = [
            scores
            for scores in stored_in(path.parent)
            if scores.configuration.bricks == sizes and len(scores.configuration.parents) > 1
        ]
        tables = tables_of(store, stored, suites_of(store, stored, {})) if stored else []
        if not (skills := [table for table in tables if table.skill]):
            continue
        suite = plan.name
        rows = sorted((_row(scores, skills, len(stored)) for scores in stored), key=lambda row: -row.value)
        created = max(scores.created for scores in stored)
        if suite not in newest or newest[suite][0] < created:
            newest[suite] = (created, rows[:MOST])
    return [row for suite in sorted(newest) for row in newest[suite][1]]


def _row(scores: Scores, skills: Sequence[Table], count: int) -> ScoredBefore:
    return ScoredBefore(
        suite=scores.suite,
        name=scores.configuration.name,
        recipe=scores.configuration.recipe,
        settings=scores.configuration.settings,
        value=mean_over(skills, scores.configuration),
        tasks=len(skills),
        items=sum(len(table.items) for table in skills),
        of=count,
    )

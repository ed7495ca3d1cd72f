"""Evidence on merges of some bricks: accuracy of the bricks alone and of a few merges on their own prompts, and stored scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.edit.greedy import said_by
from workbench.facts import SLOT, Fact
from workbench.lazy import torch
from workbench.models.live import compute, live_model
from workbench.models.texts import Text, longest_row, spread
from workbench.models.tokenizer import load_tokenizer
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import compose
from workbench.run.work import Work
from workbench.scores.paired import Paired, paired
from workbench.scores.statistics import Floats, score_interval
from workbench.scores.store import Scores, ScoreStore, plan_record, stored_in
from workbench.steps import Memo
from workbench.weights.device import exact

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ITEMS = 24
"""Largest number of prompts of each brick, evenly spaced over its texts."""
LEAST_ITEMS = 8
"""Smallest number of prompts of each brick."""
LONGEST = 2048
"""Largest number of bytes of a prompt with its answer: no tokenizer makes more tokens of it, and the base must have as many positions."""
LEVEL = 0.05


@dataclass(frozen=True)
class Accuracy:
    """Share of prompts that a model answers exactly, with its 95 % interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(right: Floats) -> Accuracy:
        """Return the accuracy of right (1) and wrong (0) answers."""
        return Accuracy(float(right.mean()), *score_interval(right, np.arange(right.size)))

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} [{100 * self.low:.0f}, {100 * self.high:.0f}]"


@dataclass(frozen=True)
class Change:
    """Difference of two accuracies on the same prompts, with the interval at the level of its family.

    Attributes:
        value: The difference.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @staticmethod
    def of(pair: Paired, family: int) -> Change:
        """Return a difference that is one of several (Bonferroni)."""
        return Change(pair.diff, *pair.interval(LEVEL / max(1, family)))

    @property
    def clear(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if self.value == self.low == self.high:
            return "the same answers"  # an interval of no width would claim more than the prompts show
        return f"{100 * self.value:+.0f} [{100 * self.low:+.0f}, {100 * self.high:+.0f}] points"


@dataclass(frozen=True)
class Candidate:
    """A model that was run.

    Attributes:
        name: Its name.
        step: The step that makes it from the base; None for the base.
        right: Brick -> for each of its prompts, 1 if the answer is exact, else 0.
    """

    name: str
    step: Mapping[str, Any] | None
    right: Mapping[str, Floats]

    @property
    def all(self) -> Floats:
        """The answers to all prompts; every brick has equally many."""
        return np.concatenate(list(self.right.values()))


@dataclass(frozen=True)
class Verdict:
    """Which candidate is advised.

    Attributes:
        name: The advised candidate.
        clear: True if the prompts decide between the best and the one that the weights suggest, or the second best.
        says: The decision as a sentence, with the difference and its interval.
    """

    name: str
    clear: bool
    says: str


@dataclass(frozen=True)
class Trial:
    """Models that were run on prompts of the bricks.

    Attributes:
        items: Number of prompts of each brick.
        base: The base.
        alone: Brick -> its own answers to its prompts.
        candidates: The merges; empty if no merge is recommended.
        verdict: Which of them is advised; None without merges.
        falls: Brick -> difference from the brick alone, for each brick that the advised merge clearly harms.
    """

    items: int
    base: Candidate
    alone: Mapping[str, Floats]
    candidates: Sequence[Candidate] = ()
    verdict: Verdict | None = None
    falls: Mapping[str, Change] = field(default_factory=dict)

    @property
    def weak(self) -> dict[str, Change]:
        """Brick -> difference from the base, for each brick that is not shown better than the base on its own prompts."""
        changes = {name: Change.of(paired(self.base.right[name], right), 1) for name, right in self.alone.items()}
        return {name: change for name, change in changes.items() if change.low <= 0}


class Runner:
    """Runs steps on the base, and asks the resulting models the bricks' own prompts.

    Args:
        bricks: Brick -> directory or hub id.
        base: Directory or hub id of the base.
        texts: Brick -> its prompts and answers, as `prompts_of` returns them.
        project: Folder that relative paths start from.
        work: Where to compute.
        most: Largest number of prompts of each brick; every brick gets equally many.
    """

    def __init__(
        self,
        bricks: Mapping[str, str],
        base: str,
        texts: Mapping[str, Sequence[Text]],
        project: Path,
        work: Work,
        most: int = ITEMS,
    ) -> None:
        count = min(most, *(len(rows) for rows in texts.values()))
        self._facts = {
            name: [Fact(row.place, row.prompt, None, row.answer, place=row.place) for row in spread(rows, count)]
            for name, rows in texts.items()
        }
        self._recipe = {"version": 1, "name": "advise", "base": base, "bricks": dict(bricks)}
        self._project, self._work, self._memo = project, work, Memo()
        self.items = count

    def run(self, name: str, step: Mapping[str, Any] | None, asked: Sequence[str] = ()) -> Candidate:
        """Run one model.

        Args:
            name: Name of the candidate.
            step: The step; None for the base.
            asked: Bricks whose prompts are asked; default: all.
        """
        self._work.events({"stage": "measure", "text": f"running {name}"})
        resolved = resolve(from_data({**self._recipe, "steps": [dict(step)] if step else []}, self._project))
        with exact(self._work.device):
            made = compose(replace(resolved, memo=self._memo), self._work.device).model
            tensors = compute(made, torch.float32, self._work.device)
            model: PreTrainedModel = live_model(made.config, tensors, resolved.tokenizer_path, self._work.device)
        tokenizer = load_tokenizer(resolved.tokenizer_path)
        right = {
            brick: np.array(said_by(model, tokenizer, self._facts[brick], self._work.device), np.float64)
            for brick in asked or self._facts
        }
        return Candidate(name, step, right)


def prompts_of(texts: Sequence[Text], config: Mapping[str, Any]) -> list[Text]:
    """Return the texts that a base can be asked: short ones with a prompt, of which a slot for a subject is no part."""
    longest = longest_row(config, LONGEST)
    return [t for t in texts if t.prompt and SLOT not in t.prompt and len(f"{t.prompt} {t.answer}".encode()) < longest]


def falls(alone: Mapping[str, Floats], merged: Candidate) -> dict[str, Change]:
    """Return brick -> difference for each brick that answers clearly less of its prompts in a merge than alone."""
    changes = {
        name: Change.of(paired(alone[name], right), len(merged.right)) for name, right in merged.right.items() if name in alone
    }
    return {name: change for name, change in changes.items() if change.high < 0}


def decide(candidates: Sequence[Candidate], suggested: str) -> Verdict:
    """Choose between candidates: the best if it is clearly better than the suggested one, which is kept otherwise.

    Args:
        candidates: At least two candidates that answered the same prompts.
        suggested: Name of the one that the bricks' weights suggest.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    ranked = sorted(candidates, key=lambda c: (-c.all.mean(), c.name != suggested))
    best = ranked[0]
    other = ranked[1] if best.name == suggested else by_name[suggested]
    change = Change.of(paired(other.all, best.all), len(candidates) - 1)
    told = f"{best.name} answers {Accuracy.of(best.all)} % of the prompts, {other.name} {Accuracy.of(other.all)} %: {change}"
    if change.clear:
        return Verdict(best.name, True, f"Measured: {told}.")
    return Verdict(suggested, False, f"{told}, so that {best.all.size} prompts cannot tell which one is better.")


MOST = 3
"""Largest number of configurations of a suite that are shown."""


@dataclass(frozen=True)
class ScoredBefore:
    """A stored configuration that was made from the same bricks.

    Attributes:
        suite: The suite that it was scored on.
        name: Its name.
        recipe: Path of its recipe; None for a control.
        value: Mean of the tasks' primary metrics.
        tasks: Number of tasks.
        items: Number of items of all tasks.
        of: Number of such configurations in the suite.
    """

    suite: str
    name: str
    recipe: str | None
    value: float
    tasks: int
    items: int
    of: int


def scored_before(store: ScoreStore, sizes: Mapping[str, int]) -> list[ScoredBefore]:
    """Return the best stored configurations that were made from exactly these bricks, suite by suite.

    A configuration counts if its bricks have the same names and the same sizes on disk. Plans with a limit on items, imported plans and
    metrics of which less is better do not count. Only the newest plan of a suite is read.

    Args:
        store: The score store.
        sizes: Brick -> bytes on disk.

    Raises:
        WorkbenchError: If a stored document is damaged.
    """
    newest: dict[str, tuple[str, list[ScoredBefore]]] = {}
    for path in store.root.glob("*/plan.json"):
        plan = plan_record(path.parent)
        if plan["partial"] or plan.get("imported"):
            continue
        primary = {
            task: about["primary"] for task, about in plan["tasks"].items() if about["primary"] not in about.get("lower", [])
        }
        stored = [
            scores
            for scores in stored_in(path.parent)
            if scores.configuration.bricks == sizes and len(scores.configuration.parents) > 1
        ]
        if not primary or not stored:
            continue
        suite = plan["suite"]["suite"]
        rows = sorted((_row(scores, primary, len(stored)) for scores in stored), key=lambda row: -row.value)
        created = max(scores.created for scores in stored)
        if suite not in newest or newest[suite][0] < created:
            newest[suite] = (created, rows[:MOST])
    return [row for suite in sorted(newest) for row in newest[suite][1]]


def _row(scores: Scores, primary: Mapping[str, str], count: int) -> ScoredBefore:
    values = [scores.tasks[task].metrics[metric].value for task, metric in primary.items()]
    configuration = scores.configuration
    items = sum(scores.tasks[task].n for task in primary)
    return ScoredBefore(
        scores.suite, configuration.name, configuration.recipe, sum(values) / len(values), len(values), items, count
    )

"""Controls of a search, and scoring of candidates in memory.

The base stays loaded; one candidate after another replaces its weights and is scored in stages. The controls, which need no search, are the
base, each brick, their average, the recipe as written and with each method of the space, task arithmetic with a few lambdas, and a mean with
the weights of LM-Cocktail.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from workbench.evaluate.lineup import LineupEntry, lineup
from workbench.ground.events import Events
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Configuration, Rows, ScoreStore
from workbench.search.halves import Stages
from workbench.search.objective import Answers, Floats, Key, Objective, gathered, guarded_values, losses
from workbench.search.result import Loss
from workbench.search.space import Space
from workbench.steps import Memo
from workbench.weights.digests import tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.evaluate.models import Resident


_ScoredPlan = tuple[ScorePlan, Rows]
Stop = Callable[[int, Answers], bool]
"""Function of (stage, answers so far) that returns True to stop the candidate."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a candidate.

    Attributes:
        digest: Digest of its weights.
        answers: Answers on the items on which it was scored.
        stage: Last stage, counted from 0.
        stopped: True if it was stopped after that stage.
        seconds: Time in seconds, by "compose" and "score".
    """

    digest: str
    answers: Answers
    stage: int
    stopped: bool
    seconds: Mapping[str, float]


class Bench:
    """Scorer of the candidates of one base.

    Args:
        recipe: Recipe of the search.
        stages: Items of the search.
        store: Store of the scores by weights, so that equal weights are scored once.
        device: Device of the model.
        events: Receiver of progress events.
    """

    def __init__(self, recipe: Recipe, stages: Stages, store: ScoreStore, device: torch.device, events: Events) -> None:
        self.recipe, self.stages, self.store = recipe, stages, store
        self.device, self.events = device, events
        # Candidates differ only in their steps, so results that merges compute from a brick's tensor are reused.
        self.memo = Memo()
        self._full: dict[str, Answers] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base in the dtype of scoring, loaded when it is first needed."""
        from workbench.run.materialize import materialize

        self.events({"stage": "search", "text": "loading the base"})
        return materialize(self._base.resolved, self.device)

    @cached_property
    def resident(self) -> Resident:
        """Scorer of the live model."""
        from workbench.evaluate.models import Resident

        return Resident(self.model, self.store)

    def digest(self) -> str:
        """Return the digest of the live model's current weights."""
        return json_digest({name: tensor_digest(p.detach()) for name, p in self.model.named_parameters()})

    def score(self, entry: LineupEntry, stop: Stop | None = None) -> Outcome:
        """Score a candidate stage by stage until it is scored on all search items or `stop` returns True.

        Raises:
            WorkbenchError: If its weights cannot be computed or log-likelihoods are not finite.
        """
        parts: list[_ScoredPlan] = []
        with self._live(entry) as live:
            for number, plans in enumerate(self.stages.search):
                parts += [(plan, self._rows(live, plan, gold=number == 0)) for plan in plans]
                answers = gathered(parts)
                last = number == len(self.stages.search) - 1
                known = self.answers(live.digest)  # of a control or an earlier candidate with the same weights
                if not last and not known and stop and stop(number, answers):
                    return Outcome(live.digest, answers, number, True, live.seconds)
            answers = replace(answers, guarded=self._guarded(live))
        self._full[live.digest] = answers
        return Outcome(live.digest, answers, len(self.stages.search) - 1, False, live.seconds)

    def test(self, entry: LineupEntry) -> tuple[Configuration, Answers]:
        """Score a configuration on the test items."""
        with self._live(entry) as live:
            answers = gathered([(plan, self._rows(live, plan, gold=False)) for plan in self.stages.test])
        return entry.configuration(live.digest), answers

    def answers(self, digest: str) -> Answers | None:
        """Return the stored answers of weights that were scored on all search items, or None."""
        if digest not in self._full:
            stages = (*self.stages.search, self.stages.guard)
            plans = [(plan, self.store.settled(plan)) for stage in stages for plan in stage]
            keys = [self._key(settled, digest) for _, settled in plans]
            if not all(self.store.has(settled, key) for (_, settled), key in zip(plans, keys, strict=True)):
                return None
            parts = [
                (plan, self.store.rows(self.store.read(settled, key))) for (plan, settled), key in zip(plans, keys, strict=True)
            ]
            first = len(parts) - len(self.stages.guard)
            guarded = {key: values for part in parts[first:] for key, values in guarded_values(*part).items()}
            self._full[digest] = replace(gathered(parts[:first]), guarded=guarded)
        return self._full[digest]

    def losses(self, answers: Answers) -> list[Loss]:
        """Return the losses against the base on guarded tasks, of a configuration that was scored on all search items."""
        return losses(self.stages.guard, self._base_answers, answers) if self.stages.guard else []

    @cached_property
    def _base_answers(self) -> Answers:
        """Answers of the base on guarded tasks, which are scored if the store does not have them."""
        with self._live(self._base) as live:
            return Answers({}, {}, self._guarded(live))

    def _guarded(self, live: _Live) -> dict[Key, Floats]:
        """Return a candidate's values on guarded tasks."""
        parts = [(plan, self._rows(live, plan, gold=False)) for plan in self.stages.guard]
        return {key: values for part in parts for key, values in guarded_values(*part).items()}

    def _key(self, plan: ScorePlan, digest: str) -> str:
        """Return the store's key of these weights; all candidates have the base's tokenizer and generation settings."""
        return str(self._base.key(plan, digest))

    @cached_property
    def _base(self) -> LineupEntry:
        return LineupEntry("base", "base", resolve(resolve(self.recipe.without_search()).recipe.derive("base", [])))

    @contextmanager
    def _live(self, entry: LineupEntry) -> Iterator[_Live]:
        """Yield a candidate whose weights replace the base's when first needed; the base's weights are restored at the end."""
        with ExitStack() as stack:
            yield _Live(self, entry, stack)

    def _rows(self, live: _Live, plan: ScorePlan, *, gold: bool) -> Rows:
        """Return the rows of a candidate under a plan from the store, or score them now."""
        settled = self.store.settled(plan)
        if not self.store.has(settled, self._key(settled, live.digest)):
            live.enter()
            started = time.perf_counter()
            self.resident.scored(plan, live.entry.configuration(live.digest), gold=gold)
            live.seconds["score"] += time.perf_counter() - started
            settled = self.store.settled(plan)
        return self.store.rows(self.store.read(settled, self._key(settled, live.digest)))


class _Live:
    """One candidate in memory."""

    def __init__(self, bench: Bench, entry: LineupEntry, stack: ExitStack) -> None:
        from workbench.run.materialize import configuration_digest

        self.entry, self._bench, self._stack, self._entered = entry, bench, stack, False
        started = time.perf_counter()
        self.resolved = replace(entry.resolved, memo=bench.memo)
        self.digest, self._tensors = configuration_digest(self.resolved, bench.device)
        self.seconds = {"compose": time.perf_counter() - started, "score": 0.0}

    def enter(self) -> None:
        """Replace the base's weights by the candidate's."""
        from workbench.run.materialize import swap

        if not self._entered:
            started = time.perf_counter()
            model = self._bench.model
            self.seconds["load"] = time.perf_counter() - started
            started = time.perf_counter()
            self._stack.enter_context(swap(model, self.resolved, self._tensors))
            self._tensors, self._entered = None, True
            self.seconds["compose"] += time.perf_counter() - started


LAMBDAS = (0.3, 0.6, 1.0)
"""Lambdas of the task arithmetic controls, and of the first candidates if lambda is a dimension."""
TEMPERATURE = 5.0
"""Temperature of LM-Cocktail (Xiao et al. 2023, arXiv 2311.13534)."""
COCKTAIL = "cocktail"


def baselines(space: Space) -> list[LineupEntry]:
    """Return the controls of a search, including the recipe as written and with each other method of the space."""
    recipe = space.recipe
    plain = recipe.without_search()
    entries = lineup([plain], sequences=False)
    bricks = _bricks(plain)
    for values in space.other_methods():
        (method,) = values.values()
        other = space.recipe_of(values, f"{recipe.name}-{method}")
        entries.append(LineupEntry(other.name, "configuration", resolve(other)))
    for lam in LAMBDAS if len(bricks) > 1 else ():
        step = {"merge": "task_arithmetic", "bricks": dict.fromkeys(bricks, 1.0), "lambda": lam}
        name = f"task-arithmetic-{lam:g}"
        entries.append(LineupEntry(name, "average", resolve(recipe.derive(name, [step], bricks))))
    unique: dict[str, LineupEntry] = {}
    for entry in entries:
        unique.setdefault(entry.resolved.key, entry)
    return list(unique.values())


def cocktail(recipe: Recipe, answers: Mapping[str, Answers], objectives: Sequence[Objective], metric: str) -> LineupEntry | None:
    """Return the mean of the bricks with weights softmax(log p / T), where log p is each brick's log-probability of right answers.

    Args:
        recipe: Recipe of the search.
        answers: Answers of the controls by name.
        objectives: Objectives of the search.
        metric: Name of the log-probability of right answers, which the first items have.

    Returns:
        The control, or None if a brick was not scored alone or no task has this log-probability.
    """
    bricks = _bricks(recipe)
    keys = list(dict.fromkeys(term.key for objective in objectives for term in objective.terms))
    if len(bricks) < 2 or not all(name in answers for name in bricks):
        return None
    log_probabilities = [value for name in bricks if (value := answers[name].mean(keys, metric)) is not None]
    if len(log_probabilities) < len(bricks):
        return None
    shares = [math.exp((value - max(log_probabilities)) / TEMPERATURE) for value in log_probabilities]
    weights = {name: round(share / sum(shares), 4) for name, share in zip(bricks, shares, strict=True)}
    step = {"merge": "linear", "bricks": weights}
    return LineupEntry(COCKTAIL, "average", resolve(recipe.derive(COCKTAIL, [step], bricks)))


def _bricks(recipe: Recipe) -> list[str]:
    """Return the bricks of the first merge step; none if there is no merge step."""
    step = next((step for step in recipe.steps if step.merges), None)
    return recipe.used_bricks(step) if step else []

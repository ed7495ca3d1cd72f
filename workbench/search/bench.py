"""Candidates in memory: the base stays resident, one candidate after the other takes its place, is scored stage by stage, and is undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from workbench.evaluate.lineup import LineupEntry
from workbench.events import Events
from workbench.files import json_digest
from workbench.models.generation import identity
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Configuration, Rows, ScoreStore
from workbench.search.halves import Stages
from workbench.search.objective import Answers, gathered
from workbench.steps import Memo
from workbench.weights.digests import tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.evaluate.resident import Resident

_Part = tuple[ScorePlan, Rows]
Stop = Callable[[int, Answers], bool]
"""(stage, what was seen) -> whether the candidate is given up."""


@dataclass(frozen=True)
class Seen:
    """What became of a candidate.

    Attributes:
        digest: Of its weights.
        answers: On the items that it has seen.
        stage: The last one, counted from 0.
        stopped: Whether it was given up there.
        seconds: "compose" and "score".
    """

    digest: str
    answers: Answers
    stage: int
    stopped: bool
    seconds: Mapping[str, float]


class Bench:
    """Scores candidates of one base.

    Args:
        recipe: The search's.
        stages: Its items.
        store: Where their scores are kept, by weights: equal weights are scored once.
        device: Where the model lives.
        gold: Whether the first stage also looks at the log-probability of right answers.
    """

    def __init__(
        self, recipe: Recipe, stages: Stages, store: ScoreStore, device: torch.device, events: Events, gold: bool
    ) -> None:
        self.recipe, self.stages, self.store = recipe, stages, store
        self.device, self.events, self.gold = device, events, gold
        # Candidates differ in their steps alone: what merges find of a brick's tensor holds for the next candidate.
        self.memo = Memo()
        self._full: dict[str, Answers] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base, in the dtype that candidates are scored in; loaded when the first candidate has to be."""
        from workbench.run.materialize import materialize

        self.events({"stage": "search", "text": "loading the base"})
        return materialize(resolve(self.recipe.derive("base", [])), self.device)

    @cached_property
    def resident(self) -> Resident:
        """What scores the live model."""
        from workbench.evaluate.resident import Resident

        return Resident(self.model, self.store)

    def digest(self) -> str:
        """Of the live model as it stands."""
        return json_digest({name: tensor_digest(p.detach()) for name, p in self.model.named_parameters()})

    def score(self, entry: LineupEntry, stop: Stop | None = None) -> Seen:
        """Score a candidate stage by stage, until it has seen all items or is given up.

        Errors: what its weights' computation raises, log-likelihoods that are no numbers.
        """
        parts: list[_Part] = []
        with self._live(entry) as live:
            for number, plans in enumerate(self.stages.search):
                parts += [(plan, self._rows(live, plan, gold=self.gold and number == 0)) for plan in plans]
                answers = gathered(parts)
                last = number == len(self.stages.search) - 1
                if not last and stop and stop(number, answers):
                    return Seen(live.digest, answers, number, True, live.seconds)
        self._full[live.digest] = answers
        return Seen(live.digest, answers, len(self.stages.search) - 1, False, live.seconds)

    def test(self, entry: LineupEntry) -> tuple[Configuration, Answers]:
        """Score a configuration on the items that no candidate has seen."""
        with self._live(entry) as live:
            answers = gathered([(plan, self._rows(live, plan, gold=False)) for plan in self.stages.test])
        return entry.configuration(live.digest), answers

    def answers(self, digest: str) -> Answers | None:
        """Return what the store has of weights that have seen all search items."""
        if digest not in self._full:
            plans = [(plan, self.store.settled(plan)) for stage in self.stages.search for plan in stage]
            keys = [self._key(settled, digest) for _, settled in plans]
            if not all(self.store.has(settled, key) for (_, settled), key in zip(plans, keys, strict=True)):
                return None
            self._full[digest] = gathered(
                (plan, self.store.rows(self.store.read(settled, key))) for (plan, settled), key in zip(plans, keys, strict=True)
            )
        return self._full[digest]

    def _key(self, plan: ScorePlan, digest: str) -> str:
        """What scores of these weights are stored by; every candidate writes texts with the base's generation settings."""
        return identity(digest, self.generation) if plan.generates else digest

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """The base's generation settings that decide texts."""
        return resolve(self.recipe.derive("base", [])).generation

    @contextmanager
    def _live(self, entry: LineupEntry) -> Iterator[_Live]:
        """A candidate whose weights take the base's place when they are first needed, and are taken out at the end."""
        with ExitStack() as stack:
            yield _Live(self, entry, stack)

    def _rows(self, live: _Live, plan: ScorePlan, *, gold: bool) -> Rows:
        """Rows of the candidate on the bench under a plan: the store's, else scored now."""
        settled = self.store.settled(plan)
        if not self.store.has(settled, self._key(settled, live.digest)):
            live.enter()
            started = time.perf_counter()
            self.resident.scored(plan, live.entry.configuration(live.digest), gold=gold)
            live.seconds["score"] += time.perf_counter() - started
            settled = self.store.settled(plan)
        return self.store.rows(self.store.read(settled, self._key(settled, live.digest)))


class _Live:
    """One candidate on the bench."""

    def __init__(self, bench: Bench, entry: LineupEntry, stack: ExitStack) -> None:
        from workbench.run.materialize import configuration_digest

        self.entry, self._bench, self._stack, self._entered = entry, bench, stack, False
        started = time.perf_counter()
        self.resolved = replace(entry.resolved, memo=bench.memo)
        self.digest, self._tensors = configuration_digest(self.resolved, bench.device)
        self.seconds = {"compose": time.perf_counter() - started, "score": 0.0}

    def enter(self) -> None:
        """Exchange the base's weights for the candidate's."""
        from workbench.run.materialize import swap

        if not self._entered:
            started = time.perf_counter()
            model = self._bench.model
            self.seconds["load"] = time.perf_counter() - started
            started = time.perf_counter()
            self._stack.enter_context(swap(model, self.resolved, self._tensors))
            self._tensors, self._entered = None, True
            self.seconds["compose"] += time.perf_counter() - started

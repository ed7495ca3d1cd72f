"""Score a live model whose weights are exchanged in place; requests, tokenizer, layouts and the check are made once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

from workbench.evaluate import summarise
from workbench.evaluate.check import RefusedError
from workbench.evaluate.packed import answered
from workbench.evaluate.requests import Requests
from workbench.evaluate.scorer import Scorer
from workbench.events import Progress
from workbench.scores.plan import GENERATED, ScorePlan
from workbench.scores.store import Configuration, Row, Scores, ScoreStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GOLD = "gold"
"""Metric besides those of the task: log-probability of the correct answer in nats, among the choices, or per token of a text."""


class Resident:
    """A live model that holds one configuration after another.

    Args:
        model: Model in the plans' dtype, on its device.
        store: Store of scores, by plan and configuration.
    """

    def __init__(self, model: PreTrainedModel, store: ScoreStore) -> None:
        self.model, self.store = model, store
        self._scorers: dict[str, Scorer] = {}

    def scored(
        self, plan: ScorePlan, configuration: Configuration, *, gold: bool = False, progress: Progress | None = None
    ) -> Scores:
        """Score the configuration whose weights the model holds now, and store the scores.

        Args:
            plan: The plan.
            configuration: The configuration that the model holds.
            gold: Add the log-probability of the correct answers, as the metric GOLD, for tasks that have them.
            progress: Called with (task, requests done, requests in total).
        """
        scorer = self._scorer(plan, configuration)
        scorer.configuration = configuration
        done: dict[str, Any] = {}
        for task in plan.suite.tasks:
            done[task] = {**scorer.task(task, None, progress), "check": None}
            if gold:
                for row, value in zip(done[task]["rows"], _gold(scorer, scorer.requests[task], done[task]), strict=True):
                    if value is not None:
                        row["metrics"][GOLD] = value
        scores = summarise(scorer.plan, configuration, done)
        return self.store.write(
            scorer.plan, scores, {t: r["rows"] for t, r in done.items()}, {t: r["items"] for t, r in done.items()}
        )

    def _scorer(self, plan: ScorePlan, configuration: Configuration) -> Scorer:
        """Return the plan's scorer, checked against lm-eval's own loop when it is created."""
        settled = self.store.settled(plan)
        if settled.digest not in self._scorers:
            self.store.write_plan(settled)
            scorer = Scorer(settled, configuration, self.model)
            try:
                scorer.check()
            except RefusedError as error:
                self.store.refuse(plan, configuration.key(plan), f"{configuration.name}: {error}")
                return self._scorer(plan, configuration)
            self._scorers[settled.digest] = scorer
        return self._scorers[settled.digest]


def _gold(scorer: Scorer, requests: Requests, done: Mapping[str, Sequence[Row]]) -> list[float | None]:
    """Return GOLD of every item; None for a task without correct answers."""
    kind = scorer.plan.kinds[requests.name]
    if kind == "multiple_choice":
        return [_among(row, item) for row, item in zip(done["rows"], done["items"], strict=True)]
    if kind != GENERATED:
        return [None] * len(done["rows"])
    firsts = {instance.doc_id: instance for instance in reversed(requests.instances)}
    first_requests = [firsts[i] for i in range(len(done["rows"]))]
    delimiter = str(getattr(requests.task.config, "target_delimiter", " "))
    texts = [_text(requests.task.doc_to_target(instance.doc)) for instance in first_requests]
    gold_requests = [
        Instance("loglikelihood", instance.doc, (str(instance.args[0]), text if text[:1].isspace() else delimiter + text), 0)
        for instance, text in zip(first_requests, texts, strict=True)
        if text
    ]
    pairs = iter(_likelihoods(scorer, gold_requests))
    return [next(pairs) if text else None for text in texts]


def _likelihoods(scorer: Scorer, instances: Sequence[Instance]) -> list[float]:
    """Return the mean log-likelihood per token of each continuation."""
    if not instances:
        return []
    pairs = [pair for (pair,) in scorer.lm.pairs(instances)]
    with scorer._scoring():
        likelihoods = answered(scorer.lm, scorer.forward, pairs, scorer.plan.scorer)
    return [float(value) / len(answer) for (value, _), (_, answer) in zip(likelihoods, pairs, strict=True)]


def _among(row: Row, item: Row) -> float | None:
    """Return the log-probability of the correct choices together, among all choices."""
    values, gold = row["loglikelihoods"], item["gold"]
    right = [g for g in (gold if isinstance(gold, list) else [gold]) if isinstance(g, int) and 0 <= g < len(values)]
    return _log_sum([values[g] for g in right]) - _log_sum(values) if right else None


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def _text(target: Any) -> str:
    first = next(iter(target), "") if isinstance(target, (list, tuple)) else target
    return str(first)

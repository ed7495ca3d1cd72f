"""Live models that are scored: lm-eval's model `workbench` for any configuration, and one model whose weights are exchanged in place."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from workbench.evaluate import register, summarise
from workbench.evaluate.check import RefusedError, checked
from workbench.evaluate.hflm import SafeHFLM, Tokenized, recalled, without_recall
from workbench.evaluate.packed import Answer, Forward, Pair, answered
from workbench.evaluate.requests import Requests
from workbench.evaluate.routed import acting, routed_groups
from workbench.evaluate.scorer import Scorer
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Progress
from workbench.models.prompts import load_tokenizer
from workbench.scores.plan import GENERATED, ScorePlan
from workbench.scores.store import Configuration, Row, Scores, ScoreStore, TaskResult

log = logging.getLogger("workbench")


class WorkbenchLM(SafeHFLM):
    """lm-eval's model `workbench`: the configuration of a recipe, a model directory or a live model.

    Shared contexts are forwarded once.

    ```python
    import lm_eval, workbench.evaluate.models
    lm_eval.simple_evaluate("workbench", model_args="recipe=recipes/starter-ties.yaml,batch_size=32", tasks=["arc_easy"])
    ```

    Args:
        pretrained: Model directory, hub ID or live model; used instead of `recipe`.
        recipe: Path of a recipe. Its configuration is composed in memory, in its output dtype.
        device: auto, cpu, cuda or cuda:N.
        scorer: prefix, packed or hflm.
        batch_size: Requests per forward pass.
        settings: HFLM's other arguments.

    Raises:
        WorkbenchError: If neither or both of `recipe` and `pretrained` are given.
    """

    def __init__(
        self,
        pretrained: Any = None,
        recipe: str | None = None,
        device: str | None = None,
        scorer: str = "prefix",
        batch_size: int | str | None = 32,
        **settings: Any,
    ) -> None:
        if (pretrained is None) == (recipe is None):
            raise WorkbenchError(
                "model 'workbench': expected recipe=FILE or pretrained=MODEL", "model_args='recipe=recipes/x.yaml'"
            )
        torch_device = _device(device, pretrained)
        if recipe is not None:
            pretrained, settings["tokenizer"] = _configuration(recipe, torch_device)
        self.scorer = scorer
        self._forward: Forward | None = None
        super().__init__(pretrained, device=str(torch_device), batch_size=batch_size or 32, **settings)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Score requests task by task, because the prompts of one task share a beginning."""
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(i)
        answered: dict[int, Answer] = {}
        for members in groups.values():
            answers = super().loglikelihood([requests[i] for i in members], disable_tqdm=disable_tqdm)
            answered.update(zip(members, answers, strict=True))
        return [answered[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[Tokenized], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[Answer]:
        pairs = [(list(context), list(answer)) for _, context, answer in requests]
        if getattr(self.model, "routing", None) is not None:
            # lm-eval passes no strings for the windows of rolling requests, which have no prompt.
            return self._routed(pairs, {i: [] if requests[i][0] is None else context for i, (context, _) in enumerate(pairs)})
        with without_recall(self.model):
            answers = self._answers(pairs)
            longer = recalled(self.model, pairs)
            if longer:
                answers_with_facts = dict(zip(longer, self._answers(list(longer.values())), strict=True))
                answers = [answers_with_facts.get(i, answer) for i, answer in enumerate(answers)]
        return answers

    def _routed(self, pairs: list[Pair], contexts: dict[int, list[int]]) -> list[Answer]:
        """Return log-likelihoods of pairs, each with the bricks that the model's router chooses from what it sees of the pair."""
        answers: dict[int, Answer] = {}
        for group in routed_groups(self.model, contexts):
            with acting(self.model, group):
                if self._forward is not None:
                    self._forward.forget()
                answers |= dict(zip(group.members, self._answers([pairs[i] for i in group.members]), strict=True))
        return [answers[i] for i in range(len(pairs))]

    def _answers(self, pairs: list[Pair]) -> list[Answer]:
        """Return log-likelihoods of tokenized pairs; the first call checks the scorer against hflm."""
        if self._forward is None and self.scorer != "hflm":
            self._forward = Forward(self.model)
            try:
                checked(self, self._forward, [pairs], self.scorer)
            except RefusedError as error:
                log.warning("scorer %s is not used: %s", self.scorer, error)
                self.scorer = "hflm"
        return answered(self, self._forward if self.scorer != "hflm" else None, pairs, self.scorer)


register()


def _device(device: str | None, pretrained: Any) -> Any:
    from workbench.models.identity import pick_device

    return pretrained.device if isinstance(pretrained, PreTrainedModel) else pick_device(device or "auto")


def _configuration(recipe: str, device: Any) -> tuple[PreTrainedModel, Any]:
    from workbench.recipe.recipe import load_recipe
    from workbench.resolve.resolve import resolve
    from workbench.run.materialize import materialize

    resolved = resolve(load_recipe(Path(recipe)))
    return materialize(resolved, device), load_tokenizer(resolved.tokenizer_path)


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
        done: dict[str, TaskResult] = {}
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


def _gold(scorer: Scorer, requests: Requests, done: TaskResult) -> list[float | None]:
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

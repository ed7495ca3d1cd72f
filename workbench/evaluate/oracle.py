"""Requests that lm-eval builds for the items of a plan, and the scores of the gold answers. No model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench.evaluate.gold import Gold, gold_answer, gold_response, metrics_of, sentence_for
from workbench.evaluate.measured import quiet
from workbench.evaluate.requests import build, by_item
from workbench.evaluate.tasks import load_tasks
from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import load_tokenizer
from workbench.scores.plan import ScorePlan


@dataclass(frozen=True)
class BuiltItem:
    """One item as lm-eval builds it.

    Attributes:
        id: ID of the item.
        requests: Context and continuation of each request; for generation the continuation is empty.
        generated: Largest number of tokens to generate.
        choices: Choices of a multiple-choice item.
        golds: Indices of the correct choices; None if the target is none of them.
        target: The target as text.
        metrics: Scores of the gold answer by the task's own filters and metrics; only metrics that are means over items.
    """

    id: str
    requests: tuple[tuple[str, str], ...]
    generated: int
    choices: tuple[str, ...] | None
    golds: tuple[int, ...] | None
    target: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BuiltTask:
    """A task's items in the plan's order.

    Attributes:
        items: The items.
        shots: Number of examples per prompt.
        shot_docs: Documents of the pool of examples, as (prompt, target).
        test_docs: Test documents, as (prompt, target).
        lower: Metrics that are better when lower.
    """

    items: list[BuiltItem]
    shots: int
    shot_docs: set[tuple[str, str]]
    test_docs: list[tuple[str, str]]
    lower: frozenset[str]


def build_task(plan: ScorePlan, name: str) -> BuiltTask:
    """Build the requests of a task's items, and score the gold answers.

    For choices, the gold one gets log-likelihood 0 and the others -10. For generation, the response is the target text of
    `doc_to_target`. A given continuation gets log-likelihood 0.

    Args:
        plan: The plan.
        name: Name of the task.

    Raises:
        WorkbenchError: If the task cannot be loaded, or its code fails on a document.
    """
    with quiet():
        try:
            task = load_tasks(plan)[name]
            items, shots, pool, tests = _build(plan, name, task)
        except WorkbenchError:
            raise
        except Exception as error:  # templates and functions of a task may raise anything
            raise WorkbenchError(
                f"task '{name}': its definition fails on a document: {type(error).__name__}: {str(error)[:200]}",
                "Check doc_to_text, doc_to_choice, doc_to_target, filters and process_results against the data's fields.",
            ) from error
    lower = frozenset(m for m in _means(task) if not task.higher_is_better().get(m, True))
    return BuiltTask(items, shots, pool, tests, lower)


def _means(task: Any) -> set[str]:
    from lm_eval.api.metrics import mean

    return {m for m, aggregation in task.aggregation().items() if aggregation is mean}


def _build(plan: ScorePlan, name: str, task: Any) -> tuple[list[BuiltItem], int, set[tuple[str, str]], list[tuple[str, str]]]:
    """Return the items with the scores of the gold answers, the number of examples, their pool and the test documents."""
    grouped = by_item(build(plan, name, task, _template(plan) if plan.suite.chat_template else None))
    gold = {number: gold_answer(task, instances[0].doc) for number, instances in grouped.items()}
    for number, instances in grouped.items():
        for instance in instances:
            instance.resps = [gold_response(task, instance, gold[number])] * max(1, instance.repeats)
    task.apply_filters()
    means = _means(task)
    items = [
        _built_item(task, plan.items[name][number].id, instances, gold[number], means) for number, instances in grouped.items()
    ]
    lower = {m for m in means if not task.higher_is_better().get(m, True)}
    perfect = all(_is_full(metric, value, lower) for item in items for metric, value in item.metrics.items())
    for pattern in _patterns(task) if task.OUTPUT_TYPE == "generate_until" and not perfect else ():
        items = _in_sentences(task, grouped, gold, items, pattern, means, lower)
    shots = int(task.config.num_fewshot or 0)
    pool = {_pair(task, doc, task.fewshot_cfg) for doc in task.fewshot_docs() or ()} if shots else set()
    return items, shots, pool, [_pair(task, doc) for doc in task.eval_docs]


def _patterns(task: Any) -> list[str]:
    """Return the regular expressions of the task's filters. They may expect a sentence, while the target is the bare answer."""
    steps = [step() for ensemble in task._filters for step in ensemble.filters]
    return list(dict.fromkeys(str(step.regex_pattern) for step in steps if hasattr(step, "regex_pattern")))


def _is_full(metric: str, value: float, lower: set[str]) -> bool:
    return abs(value - (0.0 if metric.partition(",")[0] in lower else 1.0)) <= 1e-6


def _in_sentences(
    task: Any,
    grouped: Mapping[int, Sequence[Any]],
    gold: Mapping[int, Gold],
    items: Sequence[BuiltItem],
    pattern: str,
    means: set[str],
    lower: set[str],
) -> list[BuiltItem]:
    """Return the items, with better scores from answers in a sentence that a filter's expression matches."""
    texts = {}
    for number, instances in grouped.items():
        target = str(gold_response(task, instances[0], gold[number]))
        texts[number] = sentence_for(pattern, target.strip())
        for instance in instances:
            instance.resps = [texts[number] or target] * max(1, instance.repeats)
    task.apply_filters()
    improved = []
    for item, (number, instances) in zip(items, grouped.items(), strict=True):
        metrics = _built_item(task, item.id, instances, gold[number], means).metrics if texts[number] is not None else {}
        perfect = {metric: value for metric, value in metrics.items() if _is_full(metric, value, lower)}
        improved.append(replace(item, metrics={**item.metrics, **perfect}))
    return improved


def _template(plan: ScorePlan) -> Any:
    """Return a function that applies the tokenizer's chat template as lm-eval's HFLM does."""
    tokenizer = plan.tokenizer
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)

    def apply(history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    return apply


def _built_item(task: Any, identity: str, instances: Sequence[Any], gold: Gold, means: Iterable[str]) -> BuiltItem:
    """Return an item with its requests and the scores of its gold answer."""
    kind = task.OUTPUT_TYPE
    metrics = {
        metric: float(value)
        for metric, value in metrics_of(task, instances)
        if metric.partition(",")[0] in means and not isinstance(value, (tuple, list))
    }
    requests, generated = [], 0
    for instance in instances:
        context = str(instance.args[0])
        settings: Any = instance.args[1] if len(instance.args) > 1 else ""
        if kind == "generate_until":
            generated = int(settings.get("max_gen_toks", 256))  # lm-eval's default
        requests.append((context, settings if isinstance(settings, str) else ""))
    return BuiltItem(identity, tuple(requests), generated, gold.choices, gold.indices, str(gold.target), metrics)


def _pair(task: Any, doc: Any, shot: Any = None) -> tuple[str, str]:
    """Return prompt and answer of a document, so that equal documents are found whatever their IDs are."""
    text, target = (shot.doc_to_text, shot.doc_to_target) if shot else (None, None)
    return str(task.doc_to_text(doc, text)), str(task.doc_to_target(doc, target))

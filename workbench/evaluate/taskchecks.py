"""Checks of one task of a suite: data, clusters, choices, gold answers, length, examples and prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import JsonValue

from workbench.ground.results import JsonObject
from workbench.scores.files import SHARES
from workbench.scores.paired import paired
from workbench.scores.plan import ScorePlan
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS
from workbench.scores.suite import metric_of

if TYPE_CHECKING:
    from workbench.evaluate.oracle import BuiltItem, BuiltTask

Status = Literal["ok", "warning", "failed"]
_LEVEL = 0.025  # one-sided, of the verdict "safe" on one guarded task
_CHANGED = 0.04  # share of the items that a gentle merge changes


class SuiteCheck(JsonObject):
    """One check of one task."""

    task: str
    """Name of the task, contrast or suite."""
    check: str
    """Name of the check."""
    status: Status
    """Result of the check."""
    found: str
    """Result in words."""
    hint: str | None = None
    """Advice on how to fix a problem."""


class ExamplePrompt(JsonObject):
    """An example prompt."""

    id: str
    """Id of the item."""
    prompt: str
    """The prompt."""
    choices: list[str] | None
    """Choices of a multiple-choice item."""
    continuation: str | None
    """Text that is scored after the prompt."""
    target: JsonValue
    """The right answer."""


def checked(task: str, check: str, status: Status, found: str, hint: str | None = None) -> SuiteCheck:
    """Return the result of a check."""
    return SuiteCheck(task=task, check=check, status=status, found=found, hint=hint)


def checks_of(
    plan: ScorePlan, full_plan: ScorePlan, name: str, task: BuiltTask, positions: int, count: Callable[[Sequence[str]], list[int]]
) -> Iterator[SuiteCheck]:
    """Yield all checks of a task that can be read.

    Args:
        plan: Plan of the checked items.
        full_plan: Plan of all items.
        name: Name of the task.
        task: The task's requests and gold answers.
        positions: Number of tokens that the base accepts.
        count: Returns the number of tokens of each text.
    """
    items = task.items
    number = f"{len(items)} items" if plan is full_plan else f"{len(items)} of {len(full_plan.items[name])} items"
    yield checked(name, "data", "ok", f"{number}, ids unique, {plan.kinds[name]}, primary {plan.primary(name)}")
    yield _clusters(full_plan, name)
    yield from _tolerance(full_plan, name)
    if items[0].choices is not None:
        yield _choices(name, items)
    yield _oracle(plan, name, task)
    yield _length(name, plan.kinds[name], items, positions, count)
    yield _shots(name, task)
    yield from _prompts(name, items, plan.kinds[name])


def _clusters(plan: ScorePlan, name: str) -> SuiteCheck:
    """Check the number of clusters."""
    k = len({item.cluster for item in plan.items[name]})
    text = f"{k} clusters by '{plan.suite.cluster_of(name)}'"
    hint = f"Create items from more templates or passages, or set `cluster: {{{name}: id}}` if all items are independent."
    if k < FEW_CLUSTERS:
        return checked(name, "clusters", "failed", f"{text}: with fewer than {FEW_CLUSTERS} there is no verdict", hint)
    if k < MANY_CLUSTERS:
        return checked(
            name, "clusters", "warning", f"{text}: with fewer than {MANY_CLUSTERS} only large differences are detected", hint
        )
    return checked(name, "clusters", "ok", text)


def _tolerance(plan: ScorePlan, name: str) -> Iterator[SuiteCheck]:
    """Check that a guarded task has enough items to show a configuration safe, by the test of reports for one configuration."""
    suite = plan.suite
    tolerance, worst = suite.tolerance_of(name, share=True), suite.worst_of(name, share=True) or 1.0
    if not suite.guards(name) or metric_of(plan.primary(name)) not in SHARES or tolerance is None:
        return
    clusters = [item.cluster for item in plan.items[name]]
    n, units = len(clusters), len(clusters if suite.draws_items(name) else set(clusters))
    # k clusters without a change exclude 1 - level^(1/k) of the largest change (`Changes.excludes`).
    still = math.ceil(n / units * math.log(_LEVEL) / math.log1p(-tolerance / worst)) if tolerance < worst else 1
    before, after = np.ones(n), np.ones(n)
    changed = np.linspace(0, n - 1, 2 * max(1, round(_CHANGED * n / 2))).round().astype(int)
    before[changed[::2]], after[changed[1::2]] = 0.0, 0.0
    moved = max(paired(before, after, clusters).needs(tolerance) or still, still)
    text = f"{n} items; a loss of {100 * tolerance:g} points is excluded from about {still} items on if none changes, "
    text += f"from {moved} on if {100 * _CHANGED:g} % change, as many for the better"
    if n >= still:
        yield checked(name, "tolerance", "ok", text)
    else:
        hint = f"Nothing can be shown safe: {'raise `limit`' if suite.limit else 'add items'}, or raise the suite's `tolerance` of {name}."
        yield checked(name, "tolerance", "warning", text, hint)


def _choices(name: str, items: Sequence[BuiltItem]) -> SuiteCheck:
    """Check that choices are distinct and include the gold answer."""
    outside = [item.id for item in items if item.golds is None]
    equal = [item.id for item in items if len(set(item.choices or ())) < len(item.choices or ())]
    if outside:
        return checked(
            name,
            "choices",
            "failed",
            f"the gold answer is none of the choices in {some(outside)}",
            "Correct these items: doc_to_target must give an index from 0, or the text of one choice.",
        )
    if equal:
        return checked(
            name, "choices", "failed", f"two choices are equal in {some(equal)}", "Make the choices of these items distinct."
        )
    sizes = sorted({len(item.choices or ()) for item in items})
    return checked(name, "choices", "ok", f"{' or '.join(map(str, sizes))} distinct choices, with the gold answer")


def _oracle(plan: ScorePlan, name: str, task: BuiltTask) -> SuiteCheck:
    """Check that gold answers score 1, or 0 if lower is better: required for the headline metric, a warning for others."""
    primary = plan.primary(name)
    wrong: dict[str, list[BuiltItem]] = {}
    scored: set[str] = set()
    for item in task.items:
        for metric in plan.metrics[name]:
            if metric in item.metrics:
                scored.add(metric)
                if abs(item.metrics[metric] - (0.0 if metric.partition(",")[0] in task.lower else 1.0)) > 1e-6:
                    wrong.setdefault(metric, []).append(item)
    if not scored:
        return checked(name, "gold answers", "ok", "no metric has a perfect score (log-likelihood of a text)")
    hint = "The filters or metrics reject the answer of doc_to_target: compare filter_list, until and metric_list with the data's answers."
    if primary in wrong:
        item = wrong[primary][0]
        best = 0 if primary.partition(",")[0] in task.lower else 1
        text = (
            f"{primary} of the gold answer is not {best} in {some([i.id for i in wrong[primary]])}: "
            f"target {item.target[:60]!r} scores {item.metrics[primary]:g}"
        )
        return checked(name, "gold answers", "failed", text, hint)
    if wrong:
        listed = ", ".join(f"{metric} in {len(members)} items" for metric, members in wrong.items())
        return checked(name, "gold answers", "warning", f"{primary} ok; no perfect score: {listed}", hint)
    return checked(name, "gold answers", "ok", f"perfect score in {', '.join(m for m in plan.metrics[name] if m in scored)}")


def _length(
    name: str, kind: str, items: Sequence[BuiltItem], positions: int, count: Callable[[Sequence[str]], list[int]]
) -> SuiteCheck:
    """Check the longest input: context with continuation or with all generated tokens. Rolling requests are cut into windows."""
    if kind == "loglikelihood_rolling":
        return checked(name, "length", "ok", f"texts are scored in windows of {positions} tokens")
    texts = [context + continuation for item in items for context, continuation in item.requests]
    owners = [item for item in items for _ in item.requests]
    # The last token of a continuation is predicted, not an input.
    sizes = [n + (item.generated if kind == "generate_until" else -1) for n, item in zip(count(texts), owners, strict=True)]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    parts = f" ({items[0].generated} of them generated)" if kind == "generate_until" else ""
    text = f"longest input {sizes[longest]} of {positions} tokens{parts}"
    if sizes[longest] > positions:
        over = [item.id for n, item in zip(sizes, owners, strict=True) if n > positions]
        return checked(
            name,
            "length",
            "failed",
            f"{text}: {some(list(dict.fromkeys(over)))} would be cut from the left",
            "Shorten these items, lower num_fewshot or max_gen_toks, or use a base with more positions.",
        )
    return checked(name, "length", "ok", text)


def _shots(name: str, task: BuiltTask) -> SuiteCheck:
    """Check that no test document is among the few-shot examples."""
    if not task.shots:
        return checked(name, "few-shot", "ok", "no examples in the prompts")
    shared = [pair for pair in dict.fromkeys(task.test_docs) if pair in task.shot_docs]
    if shared:
        return checked(
            name,
            "few-shot",
            "failed",
            f"{len(shared)} test documents are in the pool of {len(task.shot_docs)} examples, the first is {shared[0][0][:60]!r}",
            "Give the task a `fewshot_split` of its own, without test documents.",
        )
    return checked(
        name, "few-shot", "ok", f"{task.shots} examples from {len(task.shot_docs)} documents, none of them a test document"
    )


def _prompts(name: str, items: Sequence[BuiltItem], kind: str) -> Iterator[SuiteCheck]:
    """Check for contexts that end in a space, and for prompts that occur twice."""
    if kind == "loglikelihood_rolling":
        return
    blank = [item.id for item in items if any(context != context.rstrip() and context.strip() for context, _ in item.requests)]
    if blank:
        yield checked(
            name,
            "blanks",
            "warning",
            f"contexts end in a space in {some(blank)}",
            "Tokenizers join the space with the next word: remove it from doc_to_text and use target_delimiter.",
        )
    else:
        yield checked(name, "blanks", "ok", "no context ends in a space")
    times = Counter(item.requests for item in items)
    twice = [item.id for item in items if times[item.requests] > 1]
    if twice:
        yield checked(
            name,
            "duplicates",
            "warning",
            f"the same prompt and choices in {some(twice)}",
            "Each copy counts as an item: remove the copies, or put them into one cluster.",
        )
    else:
        yield checked(name, "duplicates", "ok", "no prompt occurs twice")


def some(ids: Sequence[str]) -> str:
    """Return the number of items with the first IDs: "5 items (a, b, c, …)"."""
    first = ", ".join(ids[:3])
    return f"{len(ids)} item{'s' if len(ids) > 1 else ''} ({first}{', …' if len(ids) > 3 else ''})"


def example(item: BuiltItem) -> ExamplePrompt:
    """Return an item as an example prompt."""
    return ExamplePrompt(
        id=item.id,
        prompt=item.requests[0][0],
        choices=list(item.choices) if item.choices is not None else None,
        continuation=item.requests[0][1] or None,
        target=item.target,
    )

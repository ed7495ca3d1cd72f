"""Scoring of routed models: requests are grouped by the bricks that the router chooses from their contexts.

Within a group the same bricks act in every forward pass, so that the ordinary scorers apply, with contexts and prefixes shared as for
any other model. The router sees a request's context only, as it does in generation; the continuation to score plays no part. A context
without text, as in rolling perplexity, goes to the base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.evaluate.requests import tasks_of
from workbench.evaluate.tasks import foreign_code
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.run.routers import SavedRouter, calibration_rows, prompt_digest
from workbench.scores.plan import item_ids

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.evaluate.requests import Requests
    from workbench.resolve.resolved import Resolved
    from workbench.scores.plan import ScorePlan

_passed: set[str] = set()  # tasks of plans whose prompts differ from those of a router, by digest


@dataclass(frozen=True)
class RoutedGroup:
    """Requests that the same bricks answer.

    Attributes:
        members: Numbers of the requests, in order.
        weights: Weights of the bricks [bricks]; None for a model without a router, whose requests are one group.
        label: The bricks' names, or "base"; empty for a model without a router.
    """

    members: tuple[int, ...]
    weights: Tensor | None = None
    label: str = ""


def routed_groups(model: Any, contexts: Mapping[int, Sequence[int]]) -> list[RoutedGroup]:
    """Group requests by the bricks that the router of a model chooses.

    Args:
        model: The model; without a router, or if its bricks act by tokens, all requests are one group.
        contexts: Number of a request -> tokens of its context.

    Returns:
        The groups: bricks in the router's order, the base last.
    """
    routing = getattr(model, "routing", None)
    if routing is None or routing.by_token or not contexts:
        return [RoutedGroup(tuple(contexts))]
    prompts = sorted({tuple(context) for context in contexts.values()})
    weights = dict(zip(prompts, routing.decide(prompts).weights, strict=True))
    by_weights: dict[tuple[float, ...], list[int]] = {}
    for number, context in contexts.items():
        by_weights.setdefault(tuple(weights[tuple(context)].tolist()), []).append(number)
    groups = []
    for key in sorted(by_weights, reverse=True):
        members = by_weights[key]
        row = weights[tuple(contexts[members[0]])]
        groups.append(RoutedGroup(tuple(members), row, routing.label(row)))
    return groups


def acting(model: Any, group: RoutedGroup | None) -> Any:
    """Let the bricks of a group act within the block; None stands for the base of a routed model.

    Bricks that act by tokens need no choice.
    """
    routing = getattr(model, "routing", None)
    if routing is None or routing.by_token:
        return contextlib.nullcontext()
    return routing.fixed(group.weights if group is not None else None)


def labels(groups: Iterable[RoutedGroup], requests: Requests, owners: Sequence[int] | None = None) -> dict[int, list[str]]:
    """Return number of an item -> what answered its requests, each once: the bricks' names, or "base".

    Args:
        groups: Groups of requests, or of pairs.
        requests: The task's requests.
        owners: For each pair, its request; None if the groups hold requests.
    """
    by_item: dict[int, list[str]] = {}
    named = {number: group.label for group in groups if group.label for number in group.members}
    for number in sorted(named):
        item = by_item.setdefault(requests.instances[owners[number] if owners else number].doc_id, [])
        if named[number] not in item:
            item.append(named[number])
    return by_item


def calibration_of(resolved: Resolved) -> dict[str, str]:
    """Return digest of each calibration prompt of a configuration's router -> its file and brick, for messages."""
    if resolved.router is not None:
        return SavedRouter(resolved.router.path).calibration()
    step = resolved.recipe.router
    if step is None:
        return {}
    rows = calibration_rows(step.prompts(resolved.recipe.project), step.prompt_files)
    return {digest: row.where for row in rows for digest in row.prompts}


def refuse_calibrated_plan(plan: ScorePlan, calibration: Mapping[str, str], who: str) -> None:
    """Check that a router was not fitted on prompts of a plan.

    Args:
        plan: The plan.
        calibration: Digest of each calibration prompt -> its file.
        who: Name of the configuration.

    Raises:
        WorkbenchError: If an item's prompt is a calibration prompt.
    """
    for name, task in tasks_of(plan).items():
        refuse_calibrated(plan, name, task, calibration, who)


def refuse_calibrated(plan: ScorePlan, name: str, task: Any, calibration: Mapping[str, str], who: str) -> None:
    """Check that a router was not fitted on the prompts of a task. A task that has passed is not compared again.

    Args:
        plan: The plan, which chooses the task's items.
        name: Name of the task.
        task: lm-eval's task.
        calibration: Digest of each calibration prompt -> its file.
        who: Name of the configuration.

    Raises:
        WorkbenchError: If an item's prompt is a calibration prompt.
    """
    key = json_digest([plan.by("hflm").digest, name, sorted(calibration)])
    if not calibration or key in _passed:
        return
    planned = {item.id for item in plan.items[name]}
    ids = item_ids(task.eval_docs, name, bundled=name in plan.bundled)
    for item, doc in zip(ids, task.eval_docs, strict=True):
        if item not in planned:
            continue
        with foreign_code(name, "built"):
            prompt = task.doc_to_text(doc)
        file = calibration.get(prompt_digest(prompt)) if isinstance(prompt, str) else None
        if file is not None:
            raise WorkbenchError(
                f"configuration '{who}', task '{name}': the prompt of item '{item}' is a calibration prompt of the router, in {file}. "
                "A router must not be scored on prompts that it was fitted on",
                "Remove the prompt from the file, or name another file under `calibration`; then run the recipe again.",
            )
    _passed.add(key)

"""Live models that edits and memories are solved on, and the gate of a run: the edited model must say the facts that a step teaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.facts.facts import Fact
from workbench.ground.events import Events, no_events
from workbench.ground.files import json_digest, read_memo, write_memo
from workbench.ground.lazy import torch
from workbench.models.identity import computed_on
from workbench.models.layout import Model
from workbench.models.prompts import load_tokenizer
from workbench.resolve.resolved import Resolved
from workbench.run.compose import Composition, compose
from workbench.run.kind import Taught
from workbench.run.record import EfficacyError, FactsSaid
from workbench.steps import MethodContext
from workbench.weights.device import free_models
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.writer import output_specs

_VERSION = 2


def check_efficacy(
    resolved: Resolved, composition: Composition, device: torch.device, events: Events = no_events
) -> dict[str, FactsSaid]:
    """Count the facts that the model says after each edit step, including steps of recipes that are used as bricks.

    The model has the weights that would be written, rounded to the output's dtype, and computes in float32. Answers are cached
    under the key of the weights, so a cached edit gets the same count as when it was solved.

    Returns:
        Step id, or "BRICK/STEP" -> its counts.

    Raises:
        EfficacyError: If the share of facts said is below a step's `min_efficacy`.
    """
    counts = _counted(resolved, composition, device, events)
    if failed := {name: row for name, row in counts.items() if row.too_few}:
        name, row = next(iter(failed.items()))
        others = f" {len(failed) - 1} more steps fail: {', '.join(list(failed)[1:])}." if len(failed) > 1 else ""
        raise EfficacyError(*refusal(f"step {name}", row, others), counts)
    return counts


def refusal(
    name: str, row: FactsSaid, others: str = "", set_by: str = "`min_efficacy: 0` in the step", what: str = "model"
) -> tuple[str, str]:
    """Return the message and the hint of the error for a step with too few facts said.

    Args:
        name: The step, for the message.
        row: Its counts.
        others: A sentence about other steps, with a space before it.
        set_by: How to disable the gate, for the hint.
        what: The result that is not written.
    """
    return (
        f"{name}: the edited model says {row.in_words}; `min_efficacy` asks for {100 * row.min_efficacy:g} %.{others} "
        f"No {what} was written",
        f"Choose other `layers:`, increase the strength of the edit, word the `template:` of a memory in another way, or correct the facts. {set_by} writes the {what} anyway.",
    )


def _counted(resolved: Resolved, composition: Composition, device: torch.device, events: Events) -> dict[str, FactsSaid]:
    """Return the counts of all steps; those of recipes used as bricks come first."""
    counts: dict[str, FactsSaid] = {}
    for name in resolved.parents:
        nested = resolved.nested.get(name)
        if nested is not None and nested.gates:
            inner = _counted(nested, compose(nested, device, events), device, events)
            counts |= {f"{name}/{step}": row for step, row in inner.items()}
    for taught in (t for t in composition.taught if t.facts):
        step = resolved.recipe.steps[taught.number]
        said = _answers(resolved, composition, taught, device, events)
        counts[taught.step] = FactsSaid.count(taught.facts, said, step.efficacy_gate or 0.0)
    return counts


def _answers(resolved: Resolved, composition: Composition, taught: Taught, device: torch.device, events: Events) -> list[bool]:
    """Return for each fact of a step whether the model says it, from the cache or by prompting the model."""
    known = _place(resolved, taught.number, device)
    record = read_memo(known, said=list)
    if record is not None and len(record["said"]) == len(taught.facts):
        return [bool(right) for right in record["said"]]
    events({"stage": "edit", "step": taught.step, "text": f"prompting the model for {len(taught.facts)} facts"})
    # The output's form can change the model of the last step: an adapter is truncated to its rank.
    model = composition.model if _is_last(resolved, taught.number) else taught.model
    said = ask(model, resolved.dtype, resolved.tokenizer_at(taught.number), taught.facts, device, taught.memory)
    write_memo(known, {"said": said})
    return said


def is_counted(resolved: Resolved, number: int) -> bool:
    """Return True if the answers of step `number` (from 0) are cached. All keys must be known."""
    return _place(resolved, number).is_file()


def _place(resolved: Resolved, number: int, device: torch.device | None = None) -> Path:
    """Return the cache file of a step's answers, named after what they depend on: weights, dtype, tokenizer, device, libraries."""
    state = resolved.key if _is_last(resolved, number) else resolved.keys[number]
    model = [state, resolved.dtype_name, resolved.tokens_at(number), computed_on(device)]
    return resolved.cache / "said" / f"{json_digest([_VERSION, number, *model])}.json"


def _is_last(resolved: Resolved, number: int) -> bool:
    return number == len(resolved.recipe.steps) - 1


def ask(
    model: Model,
    dtype: torch.dtype | None,
    tokenizer: Path,
    facts: Sequence[Fact],
    device: torch.device,
    memory: Path | None = None,
) -> list[bool]:
    """Prompt a configuration for facts, and return for each fact whether the model says its target.

    With a dtype, floating-point weights are rounded to it first; None keeps each tensor's dtype on disk.

    Args:
        model: Weights and configuration.
        dtype: Dtype that floating-point weights are rounded to first; None keeps each tensor's dtype on disk.
        tokenizer: Directory of the tokenizer.
        facts: The facts.
        device: Device that the model runs on.
        memory: Directory of a memory that acts on the model.
    """
    from workbench.models.live import compute, live_model
    from workbench.run.memories import attach_memory

    free_models(model.weights)  # the edit was solved on one
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in compute(model, dtype, device).items()}
    live = live_model(model.config, tensors, tokenizer, device)
    if memory is not None:
        live = attach_memory(live, memory, tokenizer)
    from workbench.edit.places.knowledge import said_by

    return said_by(live, load_tokenizer(tokenizer), facts, device)


@dataclass(frozen=True)
class LiveSession:
    """A configuration as a live model that edit and memory methods solve on.

    Attributes:
        resolved: The recipe.
        context: The live float32 model, its tokenizer, and the other data that a method may use.
        solved_on: Digest of the rounded weights and the configuration.
        tokenizer: Directory of the tokenizer.
        after: Key of the weights, which recipes with the same steps compute without reading the weights.
    """

    resolved: Resolved
    context: MethodContext
    solved_on: str
    tokenizer: Path
    after: str


def live_session(
    resolved: Resolved,
    steps: int,
    model: Model,
    device: torch.device,
    progress: Callable[[int, int, str], None],
    *,
    rounded_to: torch.dtype | None,
    seed: int | None = None,
) -> LiveSession:
    """Load a configuration as a live float32 model.

    Args:
        resolved: The recipe.
        steps: Number of its steps that have been applied to `model`.
        model: Weights and configuration.
        device: Device of the live model.
        progress: Callback that takes (done, total, text).
        rounded_to: Dtype that floating-point weights are rounded to first, as in a written model; None keeps each tensor's dtype
            on disk.
        seed: Seed of random numbers; the recipe's if omitted.
    """
    from workbench.models.live import compute, live_model

    rounded = compute(model, rounded_to, device)
    digests = {name: tensor_digest(tensor) for name, tensor in rounded.items()}
    solved_on = weights_digest(output_specs(model.weights.specs, rounded_to), digests, model.config)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in rounded.items()}
    if rounded_to is not torch.float32:
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    source = resolved.tokenizer_at(steps)
    live = live_model(model.config, tensors, source, device)
    tokenizer = load_tokenizer(source)
    seed = resolved.recipe.fields.seed if seed is None else seed
    context = MethodContext(live, tokenizer, model, device, resolved.recipe.project, seed, progress, resolved.cache, digests)
    return LiveSession(resolved, context, solved_on, source, resolved.state(steps))

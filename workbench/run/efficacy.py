"""The gate behind edit steps: the facts that a step teaches are asked for afterwards, and a run in which too few are said fails."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from workbench.edit.greedy import count, said_by, told, too_few
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events
from workbench.facts import Fact
from workbench.files import json_digest, read_json, write_json
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.resolve.resolved import Resolved
from workbench.run.compose import Composition, compose
from workbench.run.kind import Taught
from workbench.run.memories import attach_memory

_VERSION = 1


class EfficacyError(WorkbenchError):
    """Too few facts of an edit step are said: exit code 3.

    Attributes:
        said: What was counted for every step, for the run's record.
    """

    def __init__(self, message: str, hint: str, said: Mapping[str, Any]) -> None:
        super().__init__(message, hint, 3)
        self.said = dict(said)


def check_efficacy(
    resolved: Resolved, composition: Composition, device: torch.device, events: Events = no_events
) -> dict[str, dict[str, Any]]:
    """Count the facts that the model says after each edit step, also in recipes among the bricks that a step uses.

    The weights are those that would be written: rounded to the output's dtype, and computed with in float32. A count is kept in the
    cache by the key of the state that it was taken on, so that an edit from the cache gets the verdict that it got when it was solved.

    Args:
        resolved: The recipe.
        composition: What its steps have made.
        device: Where the model is run.
        events: Told what happens.

    Returns:
        Step id, or "BRICK/STEP" -> `{"facts": N, "said": M, "min_efficacy": share, "not_said": [ids]}`.

    Raises:
        EfficacyError: A step says less than its `min_efficacy`.
    """
    found = _counted(resolved, composition, device, events)
    if failed := {name: row for name, row in found.items() if too_few(row)}:
        name, row = next(iter(failed.items()))
        others = f" {len(failed) - 1} more steps fail: {', '.join(list(failed)[1:])}." if len(failed) > 1 else ""
        raise EfficacyError(*refusal(f"step {name}", row, others), found)
    return found


def refusal(
    name: str, row: Mapping[str, Any], others: str = "", set_by: str = "`min_efficacy: 0` in the step", what: str = "model"
) -> tuple[str, str]:
    """Return the message and the hint for a step that says too few facts; `what` is not written then, unless `set_by` says so."""
    return (
        f"{name}: the edited model says {told(row)}; `min_efficacy` asks for {100 * row['min_efficacy']:g} %.{others} "
        f"No {what} was written",
        f"Name other `layers:`, raise the strength of the edit, or correct the facts. {set_by} writes the {what} all the same.",
    )


def _counted(resolved: Resolved, composition: Composition, device: torch.device, events: Events) -> dict[str, dict[str, Any]]:
    """Counts of all steps, those of recipes among the bricks first."""
    found: dict[str, dict[str, Any]] = {}
    for name in resolved.parents:
        brick = resolved.bricks[name]
        if isinstance(brick, Resolved) and brick.gates:
            inner = _counted(brick, compose(brick, device, events), device, events)
            found |= {f"{name}/{step}": row for step, row in inner.items()}
    for taught in (t for t in composition.taught if t.facts):
        step = resolved.recipe.steps[taught.number]
        said = _asked(resolved, composition, taught, device, events)
        found[taught.step] = count(taught.facts, said, step.efficacy_gate or 0.0)
    return found


def _asked(resolved: Resolved, composition: Composition, taught: Taught, device: torch.device, events: Events) -> list[bool]:
    """Return whether the model behind a step says each of its facts: from the cache, or by asking the model."""
    known = _place(resolved, taught.number)
    record = read_json(known)
    if isinstance(record, dict) and len(record.get("said", ())) == len(taught.facts):
        return [bool(right) for right in record["said"]]
    events({"stage": "edit", "step": taught.step, "text": f"asking for {len(taught.facts)} facts"})
    # The output's form may change the last step's model once more: an adapter is cut to its rank.
    model = composition.model if _is_last(resolved, taught.number) else taught.model
    said = ask(model, resolved.dtype, resolved.tokenizer_at(taught.number), taught.facts, device, taught.memory)
    write_json(known, {"said": said})
    return said


def is_counted(resolved: Resolved, number: int) -> bool:
    """Tell whether the facts of a step, counted from 0, have been asked for before. All keys have to be known."""
    return _place(resolved, number).is_file()


def _place(resolved: Resolved, number: int) -> Path:
    """Return the file of a step's answers, named by the key of the state that gave them and the dtype that it is rounded to."""
    state = resolved.key if _is_last(resolved, number) else resolved.keys[number]
    return resolved.cache / "said" / f"{json_digest([_VERSION, state, str(resolved.dtype), number])}.json"


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
    """Ask a configuration for facts.

    Args:
        model: Its weights.
        dtype: What floats are rounded to first; None keeps that of each tensor on disk.
        tokenizer: Directory of its tokenizer.
        facts: What is asked for.
        device: Where it is run.
        memory: Directory of a memory that acts on it.
    """
    from transformers import AutoTokenizer

    gc.collect()  # the model that the edit was solved on hangs in reference cycles
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in compute(model, dtype, device).items()}
    live = live_model(model.config, tensors, tokenizer, device)
    if memory is not None:
        live = attach_memory(live, memory, tokenizer)
    return said_by(live, AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False), facts, device)

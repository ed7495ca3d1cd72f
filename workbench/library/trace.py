"""`edit trace`: a report on the layers where a model retrieves facts. Editing methods do not use it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.edit.places.parts import Parts
from workbench.edit.places.rows import check_rows
from workbench.edit.places.tracing import PLACES, Trace, What, trace
from workbench.errors import UsageError, WorkbenchError
from workbench.events import Events, no_events, progress
from workbench.facts import read_facts
from workbench.lazy import torch
from workbench.models.texts import longest_row
from workbench.run.compose import compose
from workbench.run.opened import NamedModel
from workbench.run.teaching import live_session
from workbench.scores.statistics import upper_t
from workbench.weights.device import exact

WORDS = {"subject": "subject", "subject_last": "last token of subject", "last": "last token of prompt"}
OUTPUTS: dict[What, str] = {"block": "block outputs", "feed_forward": "feed-forward outputs"}
LONGEST = 512


@dataclass(frozen=True)
class TraceTable:
    """A trace of a model.

    Attributes:
        model: Name of the model.
        file: The facts file, as the user named it.
        traces: Traces of block outputs and of feed-forward outputs.
        answers: Fact id -> the model's own next token, as text.
    """

    model: str
    file: str
    traces: Mapping[What, Trace]
    answers: Mapping[str, str]

    @property
    def layers(self) -> list[int]:
        """Layers whose outputs were restored."""
        return list(self.traces["block"].recovered)

    def interval(self, what: What, layer: int, place: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a recovered share over facts, or None if there is only one fact.

        The share is a ratio of sums over facts, r = Σaᵢ / Σbᵢ with a = restored − corrupted and b = clean − corrupted. Its
        standard error is that of the mean of aᵢ − r·bᵢ, divided by the mean of b (Cochran 1977, Sampling Techniques, §6.4). The
        interval uses Student's t.

        Args:
            what: Outputs that were restored, "block" or "feed_forward".
            layer: Layer that was restored.
            place: Position that was restored.
        """
        traced = self.traces[what]
        n, share = len(traced.rows), traced.recovered[layer][place]
        if n < 2:
            return None
        total = sum(row.clean - row.corrupted for row in traced.rows)
        residuals = [row.restored[layer][place] - row.corrupted - share * (row.clean - row.corrupted) for row in traced.rows]
        half = upper_t(0.025, n - 1) * math.sqrt(n / (n - 1) * sum(x * x for x in residuals)) / max(total, 1e-9)
        return share - half, share + half

    def document(self) -> dict[str, Any]:
        """Return the document that `edit trace --json` prints."""
        block = self.traces["block"]
        layers = {
            str(layer): {
                what: {
                    place: {"recovered": traced.recovered[layer][place], "interval": self.interval(what, layer, place)}
                    for place in PLACES
                }
                for what, traced in self.traces.items()
            }
            for layer in self.layers
        }
        facts = [
            {"id": row.fact, "answer": self.answers[row.fact], "clean": row.clean, "corrupted": row.corrupted}
            for row in block.rows
        ]
        return {
            "model": self.model,
            "file": self.file,
            "facts": block.facts,
            "clean": block.clean,
            "corrupted": block.corrupted,
            "layers": layers,
            "traced": facts,
        }


def trace_table(
    model: NamedModel,
    file: Path,
    shown: str,
    *,
    count: int = 20,
    layers: str | None = None,
    device: torch.device,
    events: Events = no_events,
) -> TraceTable:
    """Trace the first facts of a file through the configuration of a recipe, or through a model.

    Args:
        model: The model.
        file: Facts file. The traced facts must have a subject.
        shown: Name of the file in messages.
        count: Number of facts to trace.
        layers: Layers as indices "0,4,8" or a slice "4:20"; None traces all.
        device: Device of the model.
        events: Callback that receives progress events.

    Raises:
        WorkbenchError: If a fact has no subject, a layer does not exist, or all subjects are the same.
    """
    facts = read_facts(file, shown)[:count]
    if bad := [fact for fact in facts if fact.subject is None]:
        raise WorkbenchError(
            f"{bad[0].place}: a fact without 'subject' ({len(bad)} of {len(facts)}), which a trace replaces by another one",
            'Add it: {"prompt": "The capital of {subject} is", "subject": "Atlantis", …}.',
        )
    with exact(device):
        resolved = model.resolved
        current = compose(resolved, device, events).model
        chosen = layers_of(layers, current.layout.depth)
        steps, told = len(resolved.recipe.steps), progress(events, "edit", model.name)
        context = live_session(resolved, steps, current, device, told, rounded_to=torch.float32).context
        check_rows(facts, context.tokenizer, longest_row(current.config, LONGEST))
        parts = Parts.of(context)
        if layers is None:
            chosen = parts.editable  # a trace also restores the feed-forward part, which other layers do not have
        parts.check_layers(tuple(chosen), "trace")
        traces: dict[What, Trace] = {what: _checked(trace(context, parts, facts, chosen, what), shown) for what in OUTPUTS}
    answers = {row.fact: context.tokenizer.decode([row.answer]) for row in traces["block"].rows}
    return TraceTable(model.name, shown, traces, answers)


def _checked(result: Trace | None, shown: str) -> Trace:
    if result is None:
        raise WorkbenchError(
            f"{shown}: all facts have one subject, but a trace replaces subjects by others", "Use facts about several subjects."
        )
    return result


def layers_of(text: str | None, depth: int) -> list[int]:
    """Return the layers that "0,4,8" or "4:20" selects, or all layers for None.

    Args:
        text: Indices separated by commas, or a Python slice.
        depth: Number of layers of the model.

    Raises:
        WorkbenchError: If the text is invalid, selects no layer, or names a layer that does not exist.
    """
    if text is None:
        return list(range(depth))
    if re.fullmatch(r"-?\d*:-?\d*(:[1-9]\d*)?", text):
        selected: Sequence[int] = range(depth)[slice(*(int(p) if p else None for p in text.split(":")))]
    elif re.fullmatch(r"\d+(,\d+)*", text):
        selected = sorted({int(p) for p in text.split(",")})
    else:
        raise UsageError(f"--layers {text}: expected indices 0,4,8 or a slice 4:20")
    if not selected or selected[-1] >= depth:
        problem = f"layer {selected[-1]} does not exist" if selected else "selects no layer"
        raise UsageError(f"--layers {text}: {problem}; the model has layers 0 to {depth - 1}")
    return list(selected)

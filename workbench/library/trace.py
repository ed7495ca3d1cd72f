"""`edit trace`: where a model looks facts up, layer by layer. A report that decides nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.edit.places.parts import Parts
from workbench.edit.places.rows import check_rows
from workbench.edit.places.tracing import PLACES, Trace, What, trace
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events, progress
from workbench.facts import read_facts
from workbench.models.texts import longest_row
from workbench.resolve.resolved import Resolved
from workbench.run.compose import compose
from workbench.run.session import live_session
from workbench.scores.statistics import upper_t
from workbench.weights.device import exact

WORDS = {"subject": "subject", "subject_last": "last token of subject", "last": "last token of prompt"}
OUTPUTS: dict[What, str] = {"block": "block outputs", "feed_forward": "feed-forward outputs"}
LONGEST = 512


@dataclass(frozen=True)
class TraceTable:
    """A trace of a model.

    Attributes:
        model: What it is called.
        file: The facts file, as it was named.
        traces: Of block outputs and of feed-forward outputs.
        answers: Fact id -> the model's own next token, as text.
    """

    model: str
    file: str
    traces: Mapping[What, Trace]
    answers: Mapping[str, str]

    @property
    def layers(self) -> list[int]:
        """Layers that were restored."""
        return list(self.traces["block"].recovered)

    def interval(self, what: What, layer: int, place: str) -> tuple[float, float] | None:
        """95 % interval of a recovered share over facts; None for one fact.

        The share is a ratio of sums over facts, r = Σaᵢ / Σbᵢ with a = restored − corrupted and b = clean − corrupted; its standard
        error is that of the mean of aᵢ − r·bᵢ over the mean of b (Cochran 1977, Sampling Techniques, §6.4), with Student's t.
        """
        found = self.traces[what]
        n, share = len(found.rows), found.recovered[layer][place]
        if n < 2:
            return None
        total = sum(row.clean - row.corrupted for row in found.rows)
        left = [row.restored[layer][place] - row.corrupted - share * (row.clean - row.corrupted) for row in found.rows]
        half = upper_t(0.025, n - 1) * math.sqrt(n / (n - 1) * sum(x * x for x in left)) / max(total, 1e-9)
        return share - half, share + half

    def document(self) -> dict[str, Any]:
        """What `edit trace --json` prints."""
        block = self.traces["block"]
        layers = {
            str(layer): {
                what: {
                    place: {"recovered": found.recovered[layer][place], "interval": self.interval(what, layer, place)}
                    for place in PLACES
                }
                for what, found in self.traces.items()
            }
            for layer in self.layers
        }
        facts = [
            {"id": row.fact, "answer": self.answers[row.fact], "clean": row.clean, "corrupted": row.corrupted}
            for row in block.rows
        ]
        return {
            "model": self.model, "file": self.file, "facts": block.facts, "clean": block.clean, "corrupted": block.corrupted,
            "layers": layers, "traced": facts,
        }  # fmt: skip


def trace_table(
    resolved: Resolved, name: str, file: Path, shown: str, *, count: int = 20, layers: str | None = None, device: torch.device,
    events: Events = no_events,
) -> TraceTable:  # fmt: skip
    """Trace the first facts of a file through the configuration of a recipe, or a model.

    Args:
        resolved: The recipe, or a model as a recipe without steps.
        name: What it is called.
        file: Facts; all that are traced have a subject.
        shown: How errors call the file.
        count: How many.
        layers: "0,4,8", or a slice "4:20"; omitted: all.
        device: Where the model runs.
        events: Told of progress.

    Errors: facts without a subject, layers that are not there, subjects that are all the same.
    """
    facts = read_facts(file, shown)[:count]
    if bad := [fact for fact in facts if fact.subject is None]:
        raise WorkbenchError(
            f"{bad[0].place}: a fact without 'subject' ({len(bad)} of {len(facts)}): a trace swaps the subject for another one",
            'Name it: {"prompt": "The capital of {subject} is", "subject": "Atlantis", …}.',
        )
    with exact(device):
        current = compose(resolved, device, events).model
        chosen = layers_of(layers, current.layout.depth)
        context = live_session(resolved, len(resolved.recipe.steps), current, device, progress(events, "edit", name)).context
        check_rows(facts, context.tokenizer, longest_row(current.config, LONGEST))
        parts = Parts.of(context)
        if layers is None:
            chosen = parts.editable  # a trace restores the feed-forward part too
        parts.check_layers(tuple(chosen), "trace")
        found: dict[What, Trace] = {what: _traced(trace(context, parts, facts, chosen, what), shown) for what in OUTPUTS}
    return TraceTable(name, shown, found, {row.fact: context.tokenizer.decode([row.answer]) for row in found["block"].rows})


def _traced(found: Trace | None, shown: str) -> Trace:
    if found is None:
        raise WorkbenchError(f"{shown}: all facts have one subject", "A trace swaps subjects: take facts about several.")
    return found


def layers_of(text: str | None, depth: int) -> list[int]:
    """Layers that "0,4,8" or "4:20" name; all where nothing is said. Errors: none, or one that is not there."""
    if text is None:
        return list(range(depth))
    if re.fullmatch(r"-?\d*:-?\d*(:[1-9]\d*)?", text):
        found: Sequence[int] = range(depth)[slice(*(int(p) if p else None for p in text.split(":")))]
    elif re.fullmatch(r"\d+(,\d+)*", text):
        found = sorted({int(p) for p in text.split(",")})
    else:
        raise WorkbenchError(f"--layers {text}: expected indices 0,4,8 or a slice 4:20", None, 2)
    if not found or found[-1] >= depth:
        missing = f"layer {found[-1]} does not exist" if found else "names no layer"
        raise WorkbenchError(f"--layers {text}: {missing}; the model has 0..{depth - 1}", None, 2)
    return list(found)

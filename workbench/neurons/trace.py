"""`edit trace`: a report on the layers where a model retrieves facts. Editing methods do not use it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.edit.places.knowledge import PLACES, Trace, What, trace
from workbench.edit.places.parts import Parts, check_rows
from workbench.facts.published import read_facts
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.events import Events, no_events, progress
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number, Result
from workbench.models.texts import longest_row
from workbench.run.compose import compose
from workbench.run.opened import NamedModel
from workbench.run.teaching import live_session
from workbench.scores.statistics import upper_t
from workbench.weights.device import exact

WORDS = {"subject": "subject", "subject_last": "last token of subject", "last": "last token of prompt"}
OUTPUTS: dict[What, str] = {"block": "block outputs", "feed_forward": "feed-forward outputs"}
LONGEST = 512


class RecoveredShare(JsonObject):
    """Effect of restoring one layer's output at one position."""

    recovered: Number
    """Share of the answer's probability that returns; 0 as with the other subject, 1 as with the true one."""
    interval: tuple[Number, Number] | None
    """95 % interval over facts; null with one fact."""


class TracedPlaces(JsonObject):
    """Effects by position."""

    subject: RecoveredShare
    """All tokens of the subject."""
    subject_last: RecoveredShare
    """Last token of the subject."""
    last: RecoveredShare
    """Last token of the prompt."""


class TracedLayer(JsonObject):
    """Effects of restoring one layer."""

    block: TracedPlaces
    """Output of the layer."""
    feed_forward: TracedPlaces
    """Output of the layer's feed-forward part."""


class TracedFact(JsonObject):
    """A traced fact."""

    id: str
    """Id of the fact."""
    answer: str
    """The model's own next token, as text."""
    clean: Number
    """Probability of the answer with the true subject."""
    corrupted: Number
    """Probability of the answer with another subject."""


class TraceTable(Result):
    """A causal trace of facts through a model."""

    model: str
    """Name of the model."""
    file: str
    """The facts file."""
    facts: int
    """Number of traced facts."""
    clean: Number
    """Mean probability of the answers with the true subjects."""
    corrupted: Number
    """Mean probability of the answers with other subjects."""
    layers: dict[int, TracedLayer]
    """Layer, from 0 -> effects of restoring it."""
    traced: list[TracedFact]
    """The traced facts."""

    def share(self, what: What, layer: int, place: str) -> RecoveredShare:
        """Return the effect of restoring a layer's output at a position."""
        found: RecoveredShare = getattr(getattr(self.layers[layer], what), place)
        return found

    def recovered(self, what: What) -> dict[int, dict[str, float]]:
        """Return layer -> position -> recovered share."""
        return {layer: {place: self.share(what, layer, place).recovered for place in PLACES} for layer in self.layers}


def table_of(model: str, file: str, traces: Mapping[What, Trace], answers: Mapping[str, str]) -> TraceTable:
    """Return the table of the traces of block outputs and of feed-forward outputs.

    Args:
        model: Name of the model.
        file: The facts file, as the user named it.
        traces: The traces.
        answers: Fact id -> the model's own next token, as text.
    """
    block = traces["block"]

    def places(traced: Trace, layer: int) -> TracedPlaces:
        shares = {
            place: RecoveredShare(recovered=traced.recovered[layer][place], interval=interval(traced, layer, place))
            for place in PLACES
        }
        return TracedPlaces(**shares)

    return TraceTable(
        model=model,
        file=file,
        facts=block.facts,
        clean=block.clean,
        corrupted=block.corrupted,
        layers={
            layer: TracedLayer(block=places(block, layer), feed_forward=places(traces["feed_forward"], layer))
            for layer in block.recovered
        },
        traced=[
            TracedFact(id=row.fact, answer=answers[row.fact], clean=row.clean, corrupted=row.corrupted) for row in block.rows
        ],
    )


def interval(traced: Trace, layer: int, place: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a recovered share over facts, or None if there is only one fact.

    The share is a ratio of sums over facts, r = Σaᵢ / Σbᵢ with a = restored − corrupted and b = clean − corrupted. Its
    standard error is that of the mean of aᵢ − r·bᵢ, divided by the mean of b (Cochran 1977, Sampling Techniques, §6.4). The
    interval uses Student's t.
    """
    n, share = len(traced.rows), traced.recovered[layer][place]
    if n < 2:
        return None
    total = sum(row.clean - row.corrupted for row in traced.rows)
    residuals = [row.restored[layer][place] - row.corrupted - share * (row.clean - row.corrupted) for row in traced.rows]
    half = upper_t(0.025, n - 1) * math.sqrt(n / (n - 1) * sum(x * x for x in residuals)) / max(total, 1e-9)
    return share - half, share + half


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
    traces, answers = run_traces(model, file, shown, count=count, layers=layers, device=device, events=events)
    return table_of(model.name, shown, traces, answers)


def run_traces(
    model: NamedModel, file: Path, shown: str, *, count: int, layers: str | None, device: torch.device, events: Events = no_events
) -> tuple[dict[What, Trace], dict[str, str]]:
    """Return the traces behind a table, and each fact's answer as text; see `trace_table`."""
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
        steps, report = len(resolved.recipe.steps), progress(events, "edit", model.name)
        context = live_session(resolved, steps, current, device, report, rounded_to=torch.float32).context
        check_rows(facts, context.tokenizer, longest_row(current.config, LONGEST))
        parts = Parts.find(context)
        if layers is None:
            chosen = parts.editable  # a trace also restores the feed-forward part, which other layers do not have
        parts.check_layers(tuple(chosen), "trace")
        traces: dict[What, Trace] = {what: _checked(trace(context, parts, facts, chosen, what), shown) for what in OUTPUTS}
    return traces, {row.fact: context.tokenizer.decode([row.answer]) for row in traces["block"].rows}


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

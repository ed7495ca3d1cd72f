"""The carried adapter: maps between the units of both models, fitted layer by layer, their chance level, and the updates they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number
from workbench.models.hooks import hooked
from workbench.transplant.counterparts import Linear, Move, Plan
from workbench.transplant.readings import Reading, Recorded, assignment, exchanged, input_map, matched, output_map, record
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


SHUFFLES = 3
"""Number of exchanges of the source's tokens."""
LAYERS = 6
"""Largest number of layers on which the chance level is measured."""
MARGIN = 0.05
"""Least difference of a match from its chance level."""
WEAK = 0.2
"""Correlation below which a unit counts as weakly matched."""
CRITERION = (
    f"The mean matched correlation on held-out texts has to exceed each of {SHUFFLES} controls, and their mean by {MARGIN:g}. In a control "
    "the source reads the same texts with its tokens exchanged for others, and everything is fitted again."
)


class Match(JsonObject):
    """The match beside its chance level, on the same layers."""

    matched: Number
    """Mean correlation of matched units on held-out texts."""
    chance: Number
    """The same with exchanged tokens: mean of the controls."""
    controls: list[Number]
    """The same for each control."""
    layers: list[int]
    """Layers of the target that were compared."""
    above: bool
    """True if the match is above chance."""
    criterion: str
    """What counts as above chance."""


By = Literal["copy", "assign", "ridge"]
NEED_TEXTS: tuple[By, ...] = ("assign", "ridge")
MEMORY = 1 << 30
"""Bytes of activations in memory at once; the texts are read again for each group of layers that fits."""
Maps = tuple["Tensor | None", "Tensor | None"]


@dataclass(frozen=True)
class Models:
    """Both live models.

    Attributes:
        source: The source.
        target: The target.
    """

    source: PreTrainedModel
    target: PreTrainedModel


@dataclass(frozen=True)
class Carried:
    """A carried adapter.

    Attributes:
        updates: Linear layer of the target -> B [outputs, rank] and A [rank, inputs] as `left` and `right`.
        matches: Layer -> correlation of each matched unit on held-out texts, of all inputs and outputs that the carried modules have; empty
            without texts.
        match: The match beside its chance level; None without texts.
    """

    updates: Mapping[Linear, Factors]
    matches: Mapping[int, Tensor] = field(default_factory=dict)
    match: Match | None = None


def carry(
    plan: Plan,
    updates: Mapping[str, Factors],
    by: By,
    models: Models | None = None,
    readings: Sequence[Reading] = (),
    keep: frozenset[int] = frozenset(),
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Carried:
    """Carry an adapter's updates to the target.

    An update B A of the source becomes (N B)(A M): M maps what the target's layer reads to what the source's layer reads, N maps what the
    source's layer writes to what the target's layer writes. `copy` takes the identity for both.

    Args:
        plan: The counterparts.
        updates: Tensor of the source -> its update, with outputs as rows.
        by: How the maps are found.
        models: Both live models; without them, nothing is measured.
        readings: Texts as both models read them.
        keep: Tokens of the source that controls do not exchange.
        progress: Receives (layers done, layers, text).
    """
    carried: dict[Linear, Factors] = {}
    layers = sorted({move.target.layer for move in plan.moves if move.target.layer is not None})
    if models is None:
        for move in plan.moves:
            carried[move.target] = _mapped(updates[move.source.name], (None, None))
        return Carried(carried)
    count = min(LAYERS, len(layers))  # evenly spaced, first and last included
    compared = [layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)]
    shuffled: list[dict[int, Tensor]] = [{} for _ in range(SHUFFLES)]
    matches: dict[int, Tensor] = {}
    controls = [exchanged(readings, keep, seed) for seed in range(SHUFFLES)]
    for group in _groups(plan.moves, sum(len(reading.pairs) for reading in readings)):
        progress(len(matches), len(layers), f"layer {group[0].target.layer}")
        targets = [move.target.module for move in group]
        seen = record(models.target, targets, [r.target for r in readings], [[j for _, j in r.pairs] for r in readings])
        maps, found = _fit_group(group, by, models.source, readings, seen)
        for move in group:
            carried[move.target] = _mapped(updates[move.source.name], maps[move.target.name])
        matches |= found
        again = [move for move in group if move.target.layer in compared]
        for control, values in zip(controls, shuffled, strict=True):
            if again:
                values |= _fit_group(again, by, models.source, control, seen)[1]
    actual = sum(mean(matches[layer]) for layer in compared) / len(compared)
    controls_mean = [sum(map(mean, one.values())) / len(one) for one in shuffled]
    chance = math.fsum(controls_mean) / len(controls_mean)
    match = Match(
        matched=actual,
        chance=chance,
        controls=controls_mean,
        layers=compared,
        # Positions paired at random would be too weak a control: units that tell tokens apart correlate in unrelated models too.
        above=actual > max(controls_mean) and actual - chance >= MARGIN,
        criterion=CRITERION,
    )
    progress(len(layers), len(layers), "done")
    return Carried(carried, matches, match)


def mean(values: Tensor, empty: float = 0.0) -> float:
    """Return the mean over units, or `empty` for a layer without a unit that varies."""
    return float(values.double().mean()) if len(values) else empty


def _groups(moves: Sequence[Move], positions: int) -> Iterator[list[Move]]:
    """Yield the moves of as many layers at a time as fit into `MEMORY`."""
    by_layer: dict[int, list[Move]] = {}
    for move in moves:
        assert move.target.layer is not None
        by_layer.setdefault(move.target.layer, []).append(move)
    group: list[Move] = []
    used = 0
    for _, those in sorted(by_layer.items()):
        units = sum(sum(one.shape) for move in those for one in (move.target, move.source))
        if group and used + units * positions * 4 > MEMORY:
            yield group
            group, used = [], 0
        group += those
        used += units * positions * 4
    if group:
        yield group


def _fit_group(
    group: Sequence[Move], by: By, source: PreTrainedModel, readings: Sequence[Reading], seen: Recorded
) -> tuple[dict[str, Maps], dict[int, Tensor]]:
    """Fit the maps of some layers, and measure their matches on held-out texts.

    Args:
        group: The moves of these layers.
        by: How the maps are found.
        source: The live source.
        readings: The texts; in a control, with the source's tokens exchanged.
        seen: What the target's modules read and write.

    Returns:
        Tensor of the target -> maps of inputs and outputs; and the match of each layer.
    """
    names = list(dict.fromkeys(move.source.module for move in group))
    taught = record(source, names, [r.source for r in readings], [[i for i, _ in r.pairs] for r in readings])
    held = torch.tensor([r.held_out for r in readings for _ in r.pairs])
    fitted: dict[tuple[str, str, str], Tensor | None] = {}  # modules that read the same tensor have one map
    matches: dict[tuple[str, str, str], Tensor] = {}
    maps: dict[str, Maps] = {}
    values: dict[int, dict[tuple[str, str, str], Tensor]] = {}
    for move in group:
        one = move.source
        sides = (
            ("inputs", seen.alike[move.target.module], taught.alike[one.module], seen.inputs, taught.inputs),
            ("outputs", one.module, move.target.module, taught.outputs, seen.outputs),
        )
        found = []
        for kind, start, goal, starts, goals in sides:
            key = (kind, start, goal)
            if key not in fitted:
                fitted[key] = _fit(by, starts[start][~held], goals[goal][~held], kind == "outputs")
                matches[key] = matched(fitted[key], starts[start][held], goals[goal][held])
            found.append(fitted[key])
            assert move.target.layer is not None
            values.setdefault(move.target.layer, {})[key] = matches[key]
        maps[move.target.name] = (found[0], found[1])
    return maps, {layer: torch.cat(list(those.values())) for layer, those in values.items()}


def _fit(by: By, start: Tensor, goal: Tensor, outputs: bool) -> Tensor | None:
    """Return the map of one pair of tensors: of what modules write, or of what they read."""
    if by == "assign":
        return assignment(start, goal)
    if by == "ridge":
        return output_map(start, goal) if outputs else input_map(start, goal)
    return None


def _mapped(update: Factors, maps: Maps) -> Factors:
    """Return an update of the source as one of the target."""
    inputs, outputs = maps
    right = update.right if inputs is None else update.right @ inputs
    return Factors(update.left if outputs is None else outputs @ update.left, right)


@contextmanager
def acting(model: PreTrainedModel, updates: Mapping[str, Factors]) -> Iterator[None]:
    """Add updates to the outputs of linear layers inside the block: y + B A x.

    Args:
        model: The live model.
        updates: Module -> (B [outputs, rank], A [rank, inputs]) as `left` and `right`, on the model's device.
    """

    def add(update: Factors, _module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + ((args[0] @ update.right.T) @ update.left.T)

    with ExitStack() as stack:
        for name, update in updates.items():
            stack.enter_context(hooked(model.get_submodule(name), after=partial(add, update)))
        yield

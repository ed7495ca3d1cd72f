"""Bricks that a command shows or verifies: their cards, measures of their deltas, their fit to a base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workbench.adapters.bind import bind
from workbench.bricks.brick import Brick
from workbench.bricks.card import ShownCard
from workbench.bricks.fitting import fitted, lacking
from workbench.bricks.locate import resolve_base
from workbench.bricks.neuron_sets import ShownNeurons
from workbench.bricks.origin import base_for
from workbench.ground.errors import GateFailedError, WorkbenchError, shell
from workbench.ground.events import Events
from workbench.ground.lazy import torch
from workbench.ground.results import Number
from workbench.merge.measuring.delta_sums import BrickMeasures, Measures
from workbench.merge.measuring.deltas import measure
from workbench.merge.streaming.deltas import Deltas, WeightsDelta
from workbench.models.layout import Model
from workbench.run.route_statistics import card_folder, read_statistics
from workbench.weights.device import default_threads, exact
from workbench.weights.specs import block_elements, buffer, matrix


class ShownBrick(ShownCard):
    """A brick's card and the measures of its delta, or the neurons of a set."""

    neurons: ShownNeurons | None = None
    """The neurons of a set; absent for other bricks."""
    overlap: dict[str, Number] | None = None
    """Other set -> share of the neurons that are in both; absent if no other set is named."""
    delta: BrickMeasures | None = None
    """Measures of the delta; absent with `--card`, or if the brick could not be measured."""


def measure_brick(brick: Brick, others: Sequence[Brick], base: str, device: torch.device, events: Events) -> Measures:
    """Measure a brick's delta on its base, and compare it with those of other bricks.

    Raises:
        WorkbenchError: If a brick does not fit the base, or if two bricks have the same name.
    """
    checkpoint, _ = resolve_base(base, Path.cwd())
    compared = {other.name: other for other in others}
    model = base_for([brick, *compared.values()], checkpoint)
    if len(compared) < len(others) or brick.name in compared:
        raise WorkbenchError("two bricks have the same name", "Rename the directory of one of them.")
    own, *rest = (check_fit(one, model) for one in (brick, *compared.values()))

    def count(done: int, total: int) -> None:
        events({"stage": "measure", "done": done, "total": total, "text": f"{total} tensors"})

    with exact(device):
        return measure(
            model, own, dict(zip(compared, rest, strict=True)), device=device, threads=default_threads(), progress=count
        )


def check_fit(brick: Brick, base: Model) -> Deltas:
    """Return a brick's deltas on a base."""
    if brick.kind == "checkpoint":
        weights = fitted(brick, base)
        return WeightsDelta(weights, lacking(weights))
    return bind(brick.adapter, base.weights.specs, base)


def read_all(bound: Deltas, base: Model) -> int:
    """Read every delta of a brick, which refuses NaN and infinities, and return the number of tensors that it may change."""
    cpu = torch.device("cpu")
    touched = [name for name in base.weights.specs if bound.touches(name)]
    for name in touched:
        spec = base.weights.specs[name]
        if not spec.is_float:
            continue
        source, delta, rooms = base.weights.open(name, cpu), bound.open_delta(name, cpu), (buffer(spec, cpu), buffer(spec, cpu))
        for start, stop in spec.blocks(block_elements(cpu)):
            weights, out_rows = (matrix(room, start, stop, spec.cols) for room in rooms)
            source.read(start, stop, weights)
            delta.read_delta(start, stop, weights, out_rows)
    return len(touched)


def verify_statistics(brick: Brick, name: str) -> None:
    """Raise GateFailedError if the routing statistics beside a card are not those that it names."""
    if brick.card is None or brick.card.routing is None:
        return

    try:
        read_statistics(card_folder(brick), brick.card.routing)
    except WorkbenchError as error:
        raise GateFailedError(error.message, shell("workbench", "route", "measure", name)) from error


def made_again(brick: Brick, name: str) -> str:
    """Return the command that makes a brick again."""
    made = brick.card.extraction if brick.card else {}
    if made and brick.card:
        return shell("workbench", "brick", "extract", made.get("checkpoint"), "--base", brick.card.base.id, "-o", "NEW")
    if brick.card and (carried := brick.card.transplant):
        return shell("workbench", "brick", "transplant", carried.get("brick"), "--to", brick.card.base.id, "-o", "NEW")
    if brick.card and brick.card.kind == "edit":
        return shell("workbench", "edit", "rebase", name, "--onto", brick.card.base.id, "-o", "NEW")
    return shell("workbench", "brick", "train", name)

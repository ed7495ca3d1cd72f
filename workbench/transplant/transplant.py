"""`brick transplant`: an adapter carried from the base that it was trained on to another model, and the report on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import losses
from workbench.adapters.export import write_adapter
from workbench.adapters.live import live_places
from workbench.bricks.brick import Brick
from workbench.bricks.card import BaseRecord, BrickCard, read_title, write_card
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events, progress
from workbench.ground.files import check_new, new_directory, write_json
from workbench.ground.foreign_names import brick_name
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number, Result, absent
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import Text, TextRow, encode, longest_row, read_texts
from workbench.transplant.carried import CRITERION, WEAK, By, Carried, Match, Models, acting, carry, mean
from workbench.transplant.counterparts import Linear, Rule
from workbench.transplant.inputs import Inputs, Wanted, read_inputs
from workbench.transplant.readings import Reading, read_aligned
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.device import exact
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RECORD = "transplant.json"
LONGEST = 256
"""Largest number of tokens of a text."""
LEAST_TEXTS = 10
"""Fewest texts; every fifth is held out."""


class CommonPositions(JsonObject):
    """Positions of the texts at which both models have read the same text."""

    common: int
    """Number of common positions, without the first position of each text."""
    held_out: int
    """How many of them belong to held-out texts."""
    share: Number
    """Share of the positions of the shorter reading of each text, from 0 to 1."""


class CarriedLayer(JsonObject):
    """A layer of the target."""

    layer: int
    """The layer."""
    sources: list[int]
    """The layer of the source whose updates it takes, as a list."""
    modules: list[str]
    """Modules that take an update."""
    matched: Number | None
    """Mean correlation of matched units on held-out texts; null without texts."""
    under: Number | None
    """Share of units with a correlation below 0.2, from 0 to 1; null without texts."""
    units: int | None
    """Number of units, of all inputs and outputs of these modules; null without texts."""


class NotCarried(JsonObject):
    """An update that no layer of the target takes."""

    tensor: str
    """Tensor of the source."""
    reason: str
    """The reason."""


class CarriedLoss(JsonObject):
    """Mean loss per learned token on held-out texts, in nats of each model's own tokens."""

    texts: int
    """Number of held-out texts."""
    tokens: int
    """Number of learned tokens of the target."""
    source: Number
    """The source alone."""
    source_with_brick: Number
    """The source with its brick."""
    before: Number
    """The target alone."""
    after: Number
    """The target with the carried adapter."""


class Transplant(Result):
    """An adapter that was carried to another model."""

    adapter: str
    """Directory of the new adapter."""
    brick: str
    """The brick."""
    from_base: str
    """The model that it was trained on."""
    to: str
    """The target."""
    by: By
    """How units were matched."""
    layer_rule: Rule
    """How layers were matched."""
    texts: str | None
    """File of the texts; null without texts."""
    positions: CommonPositions | None
    """The texts' common positions; null without texts."""
    modules: int
    """Number of modules that take an update."""
    rank: int
    """Largest rank of an update."""
    left_out: int
    """Number of updates that are not carried."""
    layers: list[CarriedLayer]
    """The layers of the target that take updates."""
    not_carried: list[NotCarried]
    """The updates that are not carried."""
    match: Match | None
    """The match beside its chance level; null without texts."""
    forced: bool
    """True if --force was given."""
    loss: CarriedLoss | None = absent()
    """Losses, with texts."""
    notes: list[str] = []
    """Warnings."""


@dataclass(frozen=True)
class _Reads:
    """The texts as both models read them.

    Attributes:
        readings: Both models' tokens and their common positions.
        source: Texts as the source's tokens with the number of learned ones.
        target: The same for the target.
        special: Special tokens of the source.
    """

    readings: list[Reading]
    source: list[TextRow]
    target: list[TextRow]
    special: frozenset[int]

    def held_out(self, rows: Sequence[TextRow]) -> list[TextRow]:
        """Return the rows of held-out texts."""
        return [row for row, reading in zip(rows, self.readings, strict=True) if reading.held_out]


def transplant(wanted: Wanted, out: Path, *, project: Path, device: torch.device, events: Events = no_events) -> Transplant:
    """Carry an adapter to another model and write it with a card and a report.

    Args:
        wanted: The brick, the target, and how it is carried.
        out: New directory, written atomically.
        project: Directory that relative paths start from.
        device: Device of the models.
        events: Receives progress.

    Raises:
        WorkbenchError: If the inputs do not allow it, or the units match no better than by chance, unless forced.
    """
    check_new(out)
    inputs = read_inputs(wanted, project)
    reads = _read(wanted.texts, inputs) if wanted.texts is not None else None
    updates = {move.source.name: _oriented(inputs, move.source.name) for move in inputs.plan.moves}
    with exact(device):
        models = None
        if reads is not None:
            events({"stage": "carry", "step": inputs.brick.name, "text": f"loads both models on {device}"})
            models = Models(_live(inputs.source, device), _live(inputs.target, device))
        carried = carry(
            inputs.plan,
            updates,
            inputs.by,
            models,
            reads.readings if reads else (),
            reads.special if reads else frozenset(),
            progress(events, "carry", inputs.brick.name),
        )
        match = carried.match
        if match is not None and not match.above and not wanted.force:
            raise WorkbenchError(
                f"{inputs.brick.label}: units of {inputs.base} and {wanted.to} match no better than by chance: mean correlation "
                f"{match.matched:.3f}, {match.chance:.3f} with exchanged tokens. {CRITERION}",
                "The models do not share what the brick builds on: train it anew on the target, or add --force to write it nevertheless.",
            )
        loss = _losses(inputs, carried, reads, models) if reads is not None and models is not None else None
    report = Transplant(
        adapter=str(out),
        brick=inputs.brick.name,
        from_base=inputs.base,
        to=wanted.to,
        by=inputs.by,
        layer_rule=inputs.layers.rule,
        texts=str(wanted.texts) if wanted.texts else None,
        positions=_positions(reads.readings) if reads else None,
        modules=len(carried.updates),
        rank=max(update.rank for update in carried.updates.values()),
        left_out=len(inputs.plan.left),
        layers=_layers(inputs, carried),
        not_carried=[NotCarried(tensor=name, reason=why) for name, why in sorted(inputs.plan.left.items())],
        match=match,
        forced=wanted.force,
        loss=loss,
        notes=inputs.notes,
    )
    _write(inputs, wanted, carried, report, out)
    return report


def _read(file: Path, inputs: Inputs) -> _Reads:
    """Read the texts with both tokenizers."""
    texts = read_texts(file, str(file))
    if len(texts) < LEAST_TEXTS:
        raise WorkbenchError(
            f"{file}: {len(texts)} texts, expected {LEAST_TEXTS} or more: every fifth is held out to measure on", "Add texts."
        )
    source, target = (load_tokenizer(_place(model)) for model in (inputs.source, inputs.target))
    longest = min(longest_row(model.config, LONGEST) for model in (inputs.source, inputs.target))
    readings = read_aligned(texts, source, target, longest)
    read: Sequence[Text] = texts[: len(readings)]
    rows = [encode(read, tokenizer, longest) for tokenizer in (source, target)]
    return _Reads(readings, rows[0], rows[1], frozenset(source.all_special_ids))


def _place(model: Model) -> Path:
    assert isinstance(model.weights, Checkpoint)
    return model.weights.path


def _live(model: Model, device: torch.device) -> PreTrainedModel:
    """Return a model in float32."""
    return live_model(model.config, compute(model, torch.float32, device), _place(model), device)


def _oriented(inputs: Inputs, name: str) -> Factors:
    """Return an update of the source with outputs as rows, however its weight is stored."""
    update = inputs.bound.factors(name, torch.device("cpu"))
    assert update is not None
    return update.transposed() if inputs.modules[name].conv1d else update


def _by_module(updates: Mapping[Linear, Factors], device: torch.device) -> dict[str, Factors]:
    """Return updates by live module on a device."""
    return {linear.module: Factors(one.left.to(device), one.right.to(device)) for linear, one in updates.items()}


def _losses(inputs: Inputs, carried: Carried, reads: _Reads, models: Models) -> CarriedLoss:
    """Measure losses on held-out texts, with and without the adapter on both models."""
    device = next(models.target.parameters()).device
    whole = {inputs.modules[name]: _oriented(inputs, name) for name in inputs.bound.places if name in inputs.modules}
    source, target = reads.held_out(reads.source), reads.held_out(reads.target)
    return CarriedLoss(
        texts=len(target),
        tokens=sum(row.learned for row in target),
        source=_loss(models.source, {}, source),
        source_with_brick=_loss(models.source, _by_module(whole, device), source),
        before=_loss(models.target, {}, target),
        after=_loss(models.target, _by_module(carried.updates, device), target),
    )


def _loss(model: PreTrainedModel, updates: Mapping[str, Factors], rows: Sequence[TextRow]) -> float:
    """Return the mean loss per learned token with updates, in nats."""
    items = [ItemRow(row.tokens, len(row.tokens) - row.learned) for row in rows]
    with acting(model, updates):
        return losses(model, items, scored="response").mean


def _write(inputs: Inputs, wanted: Wanted, carried: Carried, report: Transplant, out: Path) -> None:
    """Write the adapter, its report and its card."""
    flip = any(linear.conv1d for linear in carried.updates)
    factors = {f"{linear.module}.weight": one.transposed() if flip else one for linear, one in carried.updates.items()}
    brick, kept = inputs.brick, inputs.brick.card
    record = {
        "brick": brick.public_name,
        "digest": brick.digest(None),
        "base": inputs.base,
        **report.model_dump(include={"by", "layer_rule", "modules", "left_out", "forced"}),
        **({"matched": round(report.match.matched, 4), "chance": round(report.match.chance, 4)} if report.match else {}),
        **({"texts": str(wanted.texts)} if wanted.texts else {}),
    }
    with new_directory(out) as partial:
        write_adapter(partial, factors, wanted.to, fan_in_fan_out=flip, mixture=live_places(inputs.target).mixture)
        write_json(partial / RECORD, {key: value for key, value in report.to_dict().items() if key != "notes"}, indent=1)
        card = BrickCard(
            version=1,
            name=brick_name(out),
            kind="adapter",
            skill=kept.skill if kept else "",
            base=BaseRecord(id=wanted.to, title=read_title(_place(inputs.target)), digest=inputs.target_digest),
            digest=Brick(brick_name(out), "adapter", partial).digest(None),
            prompt_format=kept.prompt_format if kept else "",
            licence=brick.licence(),
            data_licences=kept.data_licences if kept else {},
            transplant=record,
        )
        write_card(partial, card, made_by="workbench brick transplant", record=RECORD)


def _positions(readings: Sequence[Reading]) -> CommonPositions:
    """Return the numbers of common positions, and their share of the positions of the shorter reading."""
    common = sum(len(reading.pairs) for reading in readings)
    shorter = sum(max(1, min(len(reading.source), len(reading.target)) - 1) for reading in readings)
    held_out = sum(len(reading.pairs) for reading in readings if reading.held_out)
    return CommonPositions(common=common, held_out=held_out, share=common / shorter)


def _layers(inputs: Inputs, carried: Carried) -> list[CarriedLayer]:
    """Return what each layer of the target takes, and its match."""
    rows = []
    for layer in sorted({move.target.layer for move in inputs.plan.moves if move.target.layer is not None}):
        moves = [move for move in inputs.plan.moves if move.target.layer == layer]
        values = carried.matches.get(layer)
        rows.append(
            CarriedLayer(
                layer=layer,
                sources=sorted({move.source.layer for move in moves if move.source.layer is not None}),
                modules=[move.target.part.removesuffix(".weight") for move in moves],
                matched=None if values is None else mean(values),
                under=None if values is None else mean(values < WEAK, empty=1.0),
                units=None if values is None else len(values),
            )
        )
    return rows

"""`brick transplant`: an adapter carried from the base that it was trained on to another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import losses
from workbench.adapters.export import write_adapter
from workbench.bricks.brick import Brick
from workbench.bricks.card import BaseRecord, BrickCard, read_title, write_card
from workbench.carry.acting import acting
from workbench.carry.carried import Carried, Models, carry
from workbench.carry.chance import CRITERION
from workbench.carry.distil import Course, Teacher, distil
from workbench.carry.moves import Linear
from workbench.carry.positions import Reading, read_aligned
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events, progress
from workbench.files import check_new, new_directory, write_json
from workbench.lazy import torch
from workbench.library.extract import brick_name
from workbench.library.transplant_inputs import Inputs, Wanted, read_inputs
from workbench.library.transplant_report import report_of
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.texts import Text, TextRow, encode, longest_row, read_texts
from workbench.models.tokenizer import load_tokenizer
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


@dataclass(frozen=True)
class _Reads:
    """The texts as both models read them.

    Attributes:
        readings: Both models' tokens and their common positions.
        source: Texts as the source's tokens with the number of learned ones.
        target: The same for the target.
        equal: Whether the models read the same tokens.
        special: Special tokens of the source.
    """

    readings: list[Reading]
    source: list[TextRow]
    target: list[TextRow]
    equal: bool
    special: frozenset[int]

    def rows(self, side: str, *, held_out: bool) -> list[TextRow]:
        """Return the rows of one side, those that are held out or the others."""
        rows = self.source if side == "source" else self.target
        return [row for row, reading in zip(rows, self.readings, strict=True) if reading.held_out == held_out]


class ChanceError(WorkbenchError):
    """The units of the two models match no better than by chance.

    Args:
        message: The measurement.
        hint: What to do.
        report: The report, as plain data.
    """

    def __init__(self, message: str, hint: str, report: dict[str, Any]) -> None:
        super().__init__(message, hint)
        self.report = report


def transplant(wanted: Wanted, out: Path, *, project: Path, device: torch.device, events: Events = no_events) -> dict[str, Any]:
    """Carry an adapter to another model and write it with a card and a report.

    Args:
        wanted: The brick, the target, and how it is carried.
        out: New directory, written atomically.
        project: Directory that relative paths start from.
        device: Device of the models.
        events: Receives progress.

    Returns:
        The document of `brick transplant`, the same as in `transplant.json`.

    Raises:
        ChanceError: If the units match no better than by chance, unless forced.
        WorkbenchError: If the inputs do not allow it.
    """
    check_new(out)
    inputs = read_inputs(wanted, project)
    reads = _read(wanted.texts, inputs) if wanted.texts is not None else None
    updates = {name: _oriented(inputs, name) for move in inputs.plan.moves for name in (s.name for s in move.sources)}
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
        chance, extra = carried.chance, dict[str, Any]()
        if chance is not None and not chance.above and not wanted.force:
            raise ChanceError(
                f"{inputs.brick.label}: units of {inputs.base} and {wanted.to} match no better than by chance: mean correlation "
                f"{chance.matched:.3f}, {chance.level:.3f} with exchanged tokens. {CRITERION}",
                "The models do not share what the brick builds on: train it anew on the target, or add --force to write it nevertheless.",
                report_of(inputs, wanted, carried, reads.readings if reads else ()),
            )
        if reads is not None and models is not None:
            carried, extra = _finished(inputs, wanted, carried, reads, models, events)
    report = {"adapter": str(out), **report_of(inputs, wanted, carried, reads.readings if reads else ()), **extra}
    _write(inputs, wanted, carried, report, out)
    return {**report, "notes": inputs.notes}


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
    equal = source.get_vocab() == target.get_vocab() and [r.tokens for r in rows[0]] == [r.tokens for r in rows[1]]
    return _Reads(readings, rows[0], rows[1], equal, frozenset(source.all_special_ids))


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


def _finished(
    inputs: Inputs, wanted: Wanted, carried: Carried, reads: _Reads, models: Models, events: Events
) -> tuple[Carried, dict[str, Any]]:
    """Train the carried adapter where that is asked for, and measure losses on held-out texts.

    Returns:
        The adapter, and the fields of the report: `training`, `loss`.
    """
    source, target = models.source, models.target
    device = next(target.parameters()).device
    whole = {inputs.modules[name]: _oriented(inputs, name) for name in inputs.bound.places if name in inputs.modules}
    brick, updates = _by_module(whole, device), dict(carried.updates)
    extra: dict[str, Any] = {}
    measured = {
        "texts": len(reads.rows("target", held_out=True)),
        "tokens": sum(row.learned for row in reads.rows("target", held_out=True)),
        "source": _loss(source, {}, reads.rows("source", held_out=True)),
        "source_with_brick": _loss(source, brick, reads.rows("source", held_out=True)),
        "before": _loss(target, {}, reads.rows("target", held_out=True)),
        "after": _loss(target, _by_module(updates, device), reads.rows("target", held_out=True)),
    }
    if wanted.steps:
        teacher = Teacher(source, brick) if reads.equal else None
        report = progress(events, "train", inputs.brick.name)
        rows = reads.rows("target", held_out=False)
        by_module = _by_module(updates, device)
        trained, history = distil(target, by_module, rows, Course(wanted.steps, wanted.learning_rate), teacher, report)
        updates = {linear: trained[linear.module] for linear in updates}
        measured["trained"] = _loss(target, _by_module(updates, device), reads.rows("target", held_out=True))
        extra["training"] = {
            "steps": wanted.steps,
            "learning_rate": wanted.learning_rate,
            "objective": "source" if teacher else "texts",
            "first": history[0],
            "last": history[-1],
        }
    return Carried(updates, carried.matches, carried.chance), {**extra, "loss": measured}


def _loss(model: PreTrainedModel, updates: Mapping[str, Factors], rows: Sequence[TextRow]) -> float:
    """Return the mean loss per learned token with updates, in nats."""
    items = [ItemRow(row.tokens, len(row.tokens) - row.learned) for row in rows]
    with acting(model, updates):
        return losses(model, items, scored="response").mean


def _write(inputs: Inputs, wanted: Wanted, carried: Carried, report: dict[str, Any], out: Path) -> None:
    """Write the adapter, its report and its card."""
    flip = any(linear.conv1d for linear in carried.updates)
    factors = {f"{linear.module}.weight": one.transposed() if flip else one for linear, one in carried.updates.items()}
    brick, kept = inputs.brick, inputs.brick.card
    record = {
        "brick": brick.public_name,
        "digest": brick.digest(None),
        "base": inputs.base,
        **{key: report[key] for key in ("by", "layer_rule", "modules", "left_out", "forced")},
        **({"matched": round(carried.chance.matched, 4), "chance": round(carried.chance.level, 4)} if carried.chance else {}),
        **({"texts": str(wanted.texts)} if wanted.texts else {}),
        **({"steps": wanted.steps} if wanted.steps else {}),
    }
    with new_directory(out) as partial:
        write_adapter(partial, factors, wanted.to, fan_in_fan_out=flip)
        write_json(partial / RECORD, report, indent=1)
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

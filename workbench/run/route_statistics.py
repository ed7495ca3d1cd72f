"""`route measure` and `brick train`: the routing statistics of a brick, measured on its base and kept beside its card."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.bricks.brick import Brick
from workbench.bricks.card import BrickCard, RoutingStatistics, read_card
from workbench.bricks.locate import resolve_base
from workbench.ground import yamldoc
from workbench.ground.errors import InvalidRecipeError, UsageError, WorkbenchError, shell
from workbench.ground.events import Events, no_events
from workbench.ground.files import json_digest, write_text
from workbench.ground.foreign_names import CARD
from workbench.ground.manifest import changing
from workbench.ground.project import find_project
from workbench.ground.results import JsonObject
from workbench.models.identity import tokenizer_digest
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import read_prompts
from workbench.route.deciding.hidden import FILE, WINDOW, BrickStates, depth_of, measure_states, read_states
from workbench.weights.device import exact
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from workbench.weights.checkpoint import Checkpoint

SAMPLES = 64
"""Number of prompts that route steps read by default."""


class MeasuredBrick(RoutingStatistics, JsonObject):
    """Routing statistics of a brick, as on its card."""

    brick: str
    """Name of the brick."""


@dataclass(frozen=True)
class Measuring:
    """What is measured.

    Attributes:
        file: JSONL file of prompts.
        label: The file's name on the card and in messages.
        samples: Largest number of prompts, with every frequent wording of the file.
    """

    file: Path
    label: str
    samples: int = SAMPLES


def measuring(folder: Path, file: Path | None = None, samples: int = SAMPLES) -> Measuring:
    """Return what `measure_brick` measures, after reading card and prompts once.

    Args:
        folder: Directory of the brick's card.
        file: JSONL file of prompts; None: the rows that the brick was trained on.
        samples: Largest number of prompts.

    Raises:
        WorkbenchError: If the brick has no card or is no adapter, or the file is missing or has fewer than four different prompts.
    """
    card = _card(folder)
    found = trained_on(folder, card) if file is None else Measuring(file, str(file))
    read_prompts(found.file, found.label, samples, least=4)
    return Measuring(found.file, found.label, samples)


def measure_brick(
    folder: Path, what: Measuring, base: str | None, device: torch.device, events: Events = no_events
) -> RoutingStatistics:
    """Measure the routing statistics of a brick, and write them beside its card and into it.

    Args:
        folder: Directory of the brick's card.
        what: What is measured.
        base: Directory or hub id of the base; None: the one that the card names.
        device: Device to run the base on.
        events: Receives progress.

    Raises:
        WorkbenchError: If the brick has no card or is no adapter, prompts or base are missing, or the file has fewer than four
            different prompts.
    """
    card = _card(folder)
    project = find_project(folder.resolve() / CARD)
    prompts = read_prompts(what.file, what.label, what.samples, least=4)
    checkpoint, _ = resolve_base(base or card.base.id, project)
    with changing(folder, [CARD, FILE]):
        found = measured(folder, checkpoint, prompts, what, device, events)
        _put(folder, found)
    return found


def measured(
    folder: Path, base: Checkpoint, prompts: list[str], what: Measuring, device: torch.device, events: Events = no_events
) -> RoutingStatistics:
    """Run the base over a brick's prompts, write the statistics into its directory, and return their record for the card.

    Args:
        folder: Directory of the brick's card.
        base: The base.
        prompts: The prompts.
        what: What is measured.
        device: Device to run the base on.
        events: Receives progress.
    """
    events({"stage": "route", "text": f"routing statistics: {len(prompts)} prompts of {what.label} on {device}"})
    with exact(device):
        tensors = compute(Model(base, base.config), None, device)
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        model = live_model(base.config, tensors, base.path, device)
        states = measure_states(model, load_tokenizer(base.path), prompts, depth_of(model), WINDOW)
    stored = states.save(folder / FILE)
    return RoutingStatistics(
        file=FILE,
        digest=_digest(stored),
        base=weights_digest(output_specs(base.specs, None), digests, base.config),
        tokenizer=tokenizer_digest(base.path),
        layer=states.layer,
        window=states.window,
        pooling=states.pooling,
        prompts=len(prompts),
        source=what.label,
    )


def trained_on(folder: Path, card: BrickCard) -> Measuring:
    """Return the file of prompts that a brick was trained on.

    Raises:
        UsageError: If the card names no file, or the file is missing.
    """
    data = card.training.get("data")
    if isinstance(data, str) and (folder / data).is_file():
        return Measuring(folder / data, data)
    raise UsageError(
        f"{folder}: its card names no file of training prompts that is here",
        f"{shell('workbench', 'route', 'measure', folder, '--calibration')} PROMPTS.jsonl",
    )


def _card(folder: Path) -> BrickCard:
    """Return the card of an adapter brick. Raises WorkbenchError if it has none, or is no adapter."""
    if not (folder / CARD).is_file():
        raise WorkbenchError(
            f"{folder}: no {CARD}, on which the digest of the statistics would stand",
            "Write a card with version, name, kind: adapter and base: {id: BASE}, or name the prompts in the route step.",
        )
    card = read_card(folder)
    if card.kind not in ("adapter", "edit"):
        raise InvalidRecipeError(
            f"{folder}: is a {card.kind}, but a router chooses among adapters",
            f"{shell('workbench', 'brick', 'extract', folder, '--base')} BASE -o NEW",
        )
    return card


def _put(folder: Path, found: RoutingStatistics) -> None:
    """Write the record into the card, whose other lines and comments stay."""
    path = folder / CARD
    text = path.read_text("utf-8")
    block = yamldoc.dump({"routing": found.model_dump(mode="json")})
    kept = re.sub(r"^routing:.*\n(?:[ \t].*\n|\n)*", "", text if text.endswith("\n") else text + "\n", flags=re.MULTILINE)
    write_text(path, kept + block)
    if read_card(folder).routing != found:
        write_text(path, text)
        raise WorkbenchError(
            f"{path}: cannot write `routing` into this file", "Write the card's keys one a line, without braces."
        )


def read_statistics(folder: Path, record: RoutingStatistics) -> BrickStates:
    """Return the statistics beside a card.

    Args:
        folder: Directory of the card.
        record: The card's record of them.

    Raises:
        WorkbenchError: If the file is missing, damaged, or not the one that the card names.
    """
    states, tensors = read_states(folder / record.file, record.layer, record.window, record.pooling)
    if (digest := _digest(tensors)) != record.digest:
        raise WorkbenchError(f"{folder / record.file} has changed (digest {digest[:10]}, on the card {record.digest[:10]})")
    return states


def known_statistics(brick: Brick, base: str, tokenizer: str, say: Callable[[str], None]) -> BrickStates | None:
    """Return the statistics of a brick for a model; None if its card has none, or if they are of other inputs.

    Args:
        brick: The brick.
        base: Digest of the weights of the model that a router is fitted on.
        tokenizer: Digest of its tokenizer.
        say: Receives a line for the user if the statistics cannot be used.
    """
    record = brick.card.routing if brick.card else None
    if record is None:
        return None
    if record.base != base:
        reason = f"are of another base ({record.base[:10]}, and this is {base[:10]})"
    elif record.tokenizer != tokenizer:
        reason = "are of another tokenizer"
    else:
        try:
            return read_statistics(card_folder(brick), record)
        except WorkbenchError as error:
            reason = f"cannot be read: {error.message}"
    say(f"{brick.label}: the routing statistics on its card {reason}, so its prompts are measured again")
    return None


def card_folder(brick: Brick) -> Path:
    """Return the directory of a brick's card, which is that of its files or one above it."""
    return next(path for path in (brick.path, *brick.path.parents) if (path / CARD).is_file())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of the file's tensors."""
    return json_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})

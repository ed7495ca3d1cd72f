"""Routing statistics beside the cards of bricks: written with their digest on the card, and read only if they fit the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.bricks.brick import Brick
from workbench.bricks.card import RoutingStatistics
from workbench.bricks.hub import CARD
from workbench.errors import WorkbenchError
from workbench.files import json_digest
from workbench.route.deciding.hidden import FILE, BrickStates, read_states
from workbench.weights.digests import tensor_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def write_statistics(
    folder: Path, states: BrickStates, *, base: str, tokenizer: str, prompts: int, source: str
) -> RoutingStatistics:
    """Write the statistics of a brick beside its card, and return their record for the card.

    Args:
        folder: Directory of the card.
        states: The states of the brick's prompts and their copies.
        base: Digest of the weights of the model that was run.
        tokenizer: Digest of its tokenizer.
        prompts: Number of prompts.
        source: File of the prompts.
    """
    tensors = states.save(folder / FILE)
    return RoutingStatistics(
        file=FILE,
        digest=_digest(tensors),
        base=base,
        tokenizer=tokenizer,
        layer=states.layer,
        window=states.window,
        pooling=states.pooling,
        prompts=prompts,
        source=source,
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


def known_statistics(brick: Brick, base: str, tokenizer: str, told: Callable[[str], None]) -> BrickStates | None:
    """Return the statistics of a brick for a model; None if its card has none, or if they do not fit, which is told.

    Args:
        brick: The brick.
        base: Digest of the weights of the model that a router is fitted on.
        tokenizer: Digest of its tokenizer.
        told: Receives a line for the user.
    """
    record = brick.card.routing if brick.card else None
    if record is None:
        return None
    reason = None
    if record.base != base:
        reason = f"are of another base ({record.base[:10]}, and this is {base[:10]})"
    elif record.tokenizer != tokenizer:
        reason = "are of another tokenizer"
    else:
        try:
            return read_statistics(card_folder(brick), record)
        except WorkbenchError as error:
            reason = f"cannot be read: {error.message}"
    told(f"{brick.label}: the routing statistics on its card {reason}, so its prompts are measured again")
    return None


def card_folder(brick: Brick) -> Path:
    """Return the directory of a brick's card, which is that of its files or one above it."""
    return next(path for path in (brick.path, *brick.path.parents) if (path / CARD).is_file())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of the file's tensors."""
    return json_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})

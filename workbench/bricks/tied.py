"""Tied embeddings: detection of bricks that untie the head from the embeddings, and the base with an untied head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from workbench.bricks.brick import Brick
from workbench.bricks.source import BrickSource
from workbench.errors import WorkbenchError
from workbench.models.layout import Model
from workbench.models.tied import UntiedWeights, tied_embeddings, untied_config, with_head_of
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.header import HeadersOnlyError
from workbench.weights.specs import Weights


def untied(checkpoint: Checkpoint) -> Model:
    """Return a tied base with its head as a separate tensor."""
    names = tied_embeddings(checkpoint.specs, checkpoint.config)
    assert names is not None
    return Model(UntiedWeights(checkpoint, *names), untied_config(checkpoint.config))


def base_for(bricks: Iterable[Brick], checkpoint: Checkpoint) -> Model:
    """Return the base for a set of bricks, with a separate head if one of them unties it."""
    tied = Model(checkpoint, checkpoint.config)
    return untied(checkpoint) if any(brick.unties(tied) for brick in bricks) else tied


def find_ties(
    bricks: Mapping[str, BrickSource], checkpoint: Checkpoint, later: list[str]
) -> tuple[dict[str, str], dict[str, WorkbenchError]]:
    """Find the bricks that untie the base's head from its embeddings.

    Args:
        bricks: Name -> brick.
        checkpoint: The base.
        later: List that receives messages about checks that require tensors not downloaded yet.

    Returns:
        Brick -> how it unties the base, and brick -> error for bricks that cannot be read.
    """
    reasons, problems = {}, {}
    tied = Model(checkpoint, checkpoint.config)
    for name, brick in bricks.items():
        try:
            if reason := brick.unties(tied):
                reasons[name] = f"brick '{name}' {reason}: the output is untied, with its head stored as a separate tensor"
        except HeadersOnlyError:
            later.append(f"brick '{name}': head and embeddings stay tied")
        except WorkbenchError as error:
            problems[name] = error
    return reasons, problems


def rows_of(brick: Brick, base: Model) -> tuple[Weights | None, dict[str, Any] | None]:
    """Return the weights and configuration of a checkpoint brick, the source of vocabulary rows; (None, None) for an adapter."""
    if brick.kind != "checkpoint":
        return None, None
    return with_head_of(brick.checkpoint, base.weights, brick.checkpoint.config), brick.checkpoint.config

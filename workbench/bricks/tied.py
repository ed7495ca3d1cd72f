"""Tied embeddings among a recipe's bricks: which brick gives head and embeddings different numbers, and the base as it then is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from workbench.bricks.brick import Brick
from workbench.errors import WorkbenchError
from workbench.models.architecture import is_head
from workbench.models.layout import Model
from workbench.models.tied import UntiedWeights, tied_embeddings, untied_config, with_head_of
from workbench.weights.checkpoint import Checkpoint, HeadersOnlyError
from workbench.weights.specs import Weights


def unties(brick: Brick, base: Model) -> str | None:
    """How a brick unties the head of a tied base from its embeddings; None where both stay one tensor."""
    if tied_embeddings(base.weights.specs, base.config) is None:
        return None
    if brick.kind == "adapter":
        return brick.adapter.unties(base)
    return "has a head of its own" if any(map(is_head, brick.checkpoint.specs)) else None


def untied(checkpoint: Checkpoint) -> Model:
    """A tied base with a head of its own."""
    names = tied_embeddings(checkpoint.specs, checkpoint.config)
    assert names is not None
    return Model(UntiedWeights(checkpoint, *names), untied_config(checkpoint.config))


def base_for(bricks: Iterable[Brick], checkpoint: Checkpoint) -> Model:
    """The base as some bricks take it together: with a head of its own where one of them unties it."""
    tied = Model(checkpoint, checkpoint.config)
    return untied(checkpoint) if any(unties(brick, tied) for brick in bricks) else tied


def find_ties(
    bricks: Mapping[str, Any], checkpoint: Checkpoint, later: list[str]
) -> tuple[dict[str, str], dict[str, WorkbenchError]]:
    """Brick -> a sentence on how it unties the base; and brick -> error for those that cannot be read.

    Args:
        bricks: Name -> brick, or a resolved recipe, which says itself whether its result is untied (`unties`).
        checkpoint: The base.
        later: Gets what needs tensors that are not here.
    """
    reasons, problems = {}, {}
    tied = Model(checkpoint, checkpoint.config)
    for name, brick in bricks.items():
        try:
            own = "has a head of its own" if not isinstance(brick, Brick) and brick.unties else None
            if reason := unties(brick, tied) if isinstance(brick, Brick) else own:
                reasons[name] = f"brick '{name}' {reason}: the output is untied, its head becomes a tensor beside its embeddings"
        except HeadersOnlyError:
            later.append(f"brick '{name}': what it stores of head and embeddings leaves both one tensor")
        except WorkbenchError as error:
            problems[name] = error
    return reasons, problems


def rows_of(brick: Brick, base: Model) -> tuple[Weights | None, dict[str, Any] | None]:
    """The weights and configuration that a vocabulary takes rows from: a checkpoint's, None and None for an adapter."""
    if brick.kind != "checkpoint":
        return None, None
    return with_head_of(brick.checkpoint, base.weights, brick.checkpoint.config), brick.checkpoint.config

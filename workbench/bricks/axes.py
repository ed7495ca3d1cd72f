"""The axes along which bricks differ: origin and granularity, and the four axes of Modular Deep Learning.

Sources: Xiao et al. 2024, Configurable Foundation Models, arXiv 2409.02877; Pfeiffer et al. 2023, Modular Deep Learning, arXiv
2302.11529. A card may state an axis. What it does not state follows from the brick's kind and files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from workbench.steps.fields import Strict

Origin: TypeAlias = Literal["customized", "emergent"]
Granularity: TypeAlias = Literal["neuron", "group", "layer", "model"]
Computation: TypeAlias = Literal["low_rank_update", "structured_update", "weights", "neuron_mask", "memory"]
Routing: TypeAlias = Literal["none", "task", "sequence", "token"]
Aggregation: TypeAlias = Literal["parameter_sum", "representation_sum", "none"]
Training: TypeAlias = Literal["joint", "continual", "post_hoc", "none"]


class Axes(Strict):
    """Place of a brick among all kinds of bricks. Omitted fields follow from its kind and its files."""

    origin: Origin | None = None
    """`customized`: made by training or editing. `emergent`: a part of the pretrained model itself."""
    granularity: Granularity | None = None
    """Smallest part of a model that the brick consists of: single neurons, groups of neurons such as experts, updates of layers, or a
    whole model."""
    computation: Computation | None = None
    """Computation function: a low-rank update (LoRA), another structured update (LoKr, OFT, ...), whole weights, a mask over neurons, or
    a memory beside the model."""
    routing: Routing | None = None
    """Level at which a router selects the brick; `none` if it is always active."""
    aggregation: Aggregation | None = None
    """How the brick is combined with others: sum of parameters, weighted sum of outputs, or not at all."""
    training: Training | None = None
    """When the brick was trained: together with others (`joint`), after others and with regard to them (`continual`), alone on a
    finished base (`post_hoc`), or never (`none`)."""

    def stated(self) -> dict[str, str]:
        """Return axis -> value for the axes that are set."""
        return {name: value for name, value in self if value is not None}


_ROUTING = ("none", "task", "sequence", "token")
_TRAINED = ("post_hoc", "continual", "joint")
_SUMMED = ("parameter_sum", "representation_sum")
# Kind of brick -> axis -> possible values; the first is the default.
_POSSIBLE: dict[str, dict[str, tuple[str, ...]]] = {
    "adapter": {
        "origin": ("customized",),
        "granularity": ("layer",),
        "computation": ("low_rank_update", "structured_update"),
        "routing": _ROUTING,
        "aggregation": _SUMMED,
        "training": _TRAINED,
    },
    "checkpoint": {
        "origin": ("customized",),
        "granularity": ("model",),
        "computation": ("weights",),
        "routing": _ROUTING,
        "aggregation": _SUMMED,
        "training": _TRAINED,
    },
    "neurons": {
        "origin": ("emergent",),
        "granularity": ("neuron", "group"),
        "computation": ("neuron_mask",),
        "routing": _ROUTING,
        "aggregation": ("none", "representation_sum"),
        "training": ("none",),
    },
}
_POSSIBLE["edit"] = _POSSIBLE["adapter"]


def axes_of(
    kind: str,
    stated: Axes,
    training: Mapping[str, Any] | None = None,
    *,
    tuner: str | None = None,
    experts: bool = False,
) -> dict[str, str]:
    """Return axis -> value of a brick: what its card states, and what follows from its kind and files.

    Args:
        kind: Kind of the brick.
        stated: The axes on its card.
        training: Settings of its training.
        tuner: `peft_type` of an adapter; None if unknown.
        experts: True if a set of neurons consists of experts.
    """
    values = {axis: possible[0] for axis, possible in _POSSIBLE[kind].items()}
    if tuner is not None and tuner.upper() not in ("LORA", "ADALORA"):
        values["computation"] = "structured_update"
    if (training or {}).get("orthogonal_to"):
        values["training"] = "continual"
    if experts:
        values |= {"granularity": "group", "routing": "token", "aggregation": "representation_sum"}
    return values | stated.stated()


def contradiction(kind: str, stated: Axes) -> tuple[str, str] | None:
    """Return the first axis on a card that a brick of this kind cannot have, with an explanation; None if there is none."""
    for axis, value in stated.stated().items():
        if value not in (possible := _POSSIBLE[kind][axis]):
            return axis, f"a brick of kind {kind} has {axis} {' or '.join(possible)}, found {value}"
    return None

"""The report of `brick transplant` as plain data: what was carried, what was not, and how well the models match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.carry.carried import Carried
from workbench.carry.chance import CRITERION
from workbench.carry.positions import Reading
from workbench.library.transplant_inputs import Inputs, Wanted


def report_of(inputs: Inputs, wanted: Wanted, carried: Carried, readings: Sequence[Reading]) -> dict[str, Any]:
    """Return the report, without losses.

    Args:
        inputs: The inputs.
        wanted: What the user asked for.
        carried: The carried adapter.
        readings: The texts as both models read them.
    """
    chance = carried.chance
    return {
        "brick": inputs.brick.name,
        "from_base": inputs.base,
        "to": wanted.to,
        "by": inputs.by,
        "layer_rule": inputs.layers.rule,
        "texts": str(wanted.texts) if wanted.texts else None,
        "positions": _positions(readings) if readings else None,
        "modules": len(carried.updates),
        "rank": max(update.rank for update in carried.updates.values()),
        "left_out": len(inputs.plan.left),
        "layers": _layers(inputs, carried),
        "not_carried": [{"tensor": name, "reason": why} for name, why in sorted(inputs.plan.left.items())],
        "match": None
        if chance is None
        else {
            "matched": chance.matched,
            "chance": chance.level,
            "controls": list(chance.shuffled),
            "layers": list(chance.layers),
            "above": chance.above,
            "criterion": CRITERION,
        },
        "forced": wanted.force,
    }


def _positions(readings: Sequence[Reading]) -> dict[str, Any]:
    """Return the numbers of common positions, and their share of the positions of the shorter reading."""
    common = sum(len(reading.pairs) for reading in readings)
    shorter = sum(max(1, min(len(reading.source), len(reading.target)) - 1) for reading in readings)
    held_out = sum(len(reading.pairs) for reading in readings if reading.held_out)
    return {"common": common, "held_out": held_out, "share": common / shorter}


def _layers(inputs: Inputs, carried: Carried) -> list[dict[str, Any]]:
    """Return what each layer of the target takes, and its match."""
    matches = {match.layer: match for match in carried.matches}
    rows = []
    for layer in sorted({move.target.layer for move in inputs.plan.moves if move.target.layer is not None}):
        moves = [move for move in inputs.plan.moves if move.target.layer == layer]
        sources = sorted({one.layer for move in moves for one in move.sources if one.layer is not None})
        match = matches.get(layer)
        rows.append(
            {
                "layer": layer,
                "sources": sources,
                "modules": [move.target.part.removesuffix(".weight") for move in moves],
                "matched": match.mean if match else None,
                "under": match.under if match else None,
                "units": len(match.values) if match else None,
            }
        )
    return rows

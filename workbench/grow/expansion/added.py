"""Masks of the elements that growth added to a live model's parameters.

transformers may keep several tensors of the files in one parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.grow.expansion.remap import GrownWeights
from workbench.lazy import torch
from workbench.models.live import live_runs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def new_elements(
    model: PreTrainedModel, weights: GrownWeights, config: Mapping[str, Any], names: Collection[str] | None = None
) -> dict[str, Tensor | None]:
    """Return the parameters that have added elements.

    Args:
        model: The grown model.
        weights: The grown weights on disk.
        config: The grown config.json.
        names: Tensors to look at; None for all.

    Returns:
        Parameter name -> bool tensor of its shape, true for added elements; None if all elements are added.
    """
    checked = weights.specs if names is None else names
    added = {name: mask for name in checked if (mask := weights.added(name)) is not None}
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor | None] = {}
    for live, runs in live_runs(config, weights.specs).items():
        if live not in parameters or not any(run.name in added for run in runs):
            continue
        rows = []
        for run in runs:
            spec = weights.specs[run.name]
            mask = added.get(run.name, np.zeros((spec.rows, spec.cols), bool))
            rows.append(mask[run.row : run.row + run.count])
        is_added = np.concatenate(rows)
        if is_added.any():
            parameter = parameters[live]
            masks[live] = None if is_added.all() else torch.from_numpy(is_added).reshape(parameter.shape).to(parameter.device)
    return masks

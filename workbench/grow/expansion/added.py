"""Which elements of a live model's parameters growth has added, also where transformers keeps several tensors of the files in one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.grow.expansion.remap import GrownWeights
from workbench.models.conversion import live_runs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def new_elements(
    model: PreTrainedModel, weights: GrownWeights, config: Mapping[str, Any], names: Collection[str] | None = None
) -> dict[str, Tensor | None]:
    """Parameters with additions.

    Args:
        model: The grown model.
        weights: Its weights on disk.
        config: Its config.json.
        names: Tensors that are looked at; None: all.

    Returns:
        Parameter -> bool tensor of its shape, true where growth has added the element; None: everywhere.
    """
    looked_at = weights.specs if names is None else names
    added = {name: mask for name in looked_at if (mask := weights.added(name)) is not None}
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor | None] = {}
    for live, runs in live_runs(config, weights.specs).items():
        if live not in parameters or not any(run.name in added for run in runs):
            continue
        rows = []
        for run in runs:
            spec = weights.specs[run.name]
            mask = added.get(run.name, np.zeros((spec.rows, spec.cols), bool))
            rows.append(mask[run.row : run.row + run.count])
        whole = np.concatenate(rows)
        if whole.any():
            parameter = parameters[live]
            found[live] = None if whole.all() else torch.from_numpy(whole).reshape(parameter.shape).to(parameter.device)
    return found

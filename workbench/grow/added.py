"""Which elements of a live model's parameters growth has added, also where transformers keeps several tensors of the files in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from workbench.conversion import live_runs
from workbench.registry import Growth
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def new_elements(model: PreTrainedModel, growth: Growth, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor | None]:
    """Parameters with additions.

    Args:
        model: The grown model.
        growth: What its method planned.
        specs: Of the weights before growth.

    Returns:
        Parameter -> bool tensor of its shape, true where growth has added the element; None: everywhere.
    """
    grown = {name: g.spec(specs[g.source]) for name, g in growth.tensors.items()}
    added = {name: mask for name, g in growth.tensors.items() if (mask := g.added(specs[g.source])) is not None}
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor | None] = {}
    for live, runs in live_runs(growth.config, grown).items():
        if live not in parameters or not any(run.name in added for run in runs):
            continue
        rows = []
        for run in runs:
            spec = grown[run.name]
            mask = added[run.name].reshape(spec.rows, -1) if run.name in added else np.zeros((spec.rows, spec.cols), bool)
            rows.append(mask[run.row : run.row + run.count])
        whole = np.concatenate(rows)
        if whole.any():
            parameter = parameters[live]
            found[live] = None if whole.all() else torch.from_numpy(whole).reshape(parameter.shape).to(parameter.device)
    return found

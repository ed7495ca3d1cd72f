"""Partitions as files: partition.json and partition.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.emergent.partition import Partition
from workbench.files import write_json
from workbench.lazy import torch
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

RECORD, TENSORS = "partition.json", "partition.safetensors"


def write_partition(folder: Path, partition: Partition) -> None:
    """Write a partition as partition.json and partition.safetensors.

    Tensors: `experts.LAYER`, the neurons of each expert [experts, size] int32, shared experts first; and `representatives.LAYER`
    [experts] int32 where the method names neurons that stand for experts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, layer in partition.layers.items():
        tensors[f"experts.{number}"] = layer.experts.to(torch.int32)
        if layer.representatives is not None:
            tensors[f"representatives.{number}"] = layer.representatives.to(torch.int32)
    save_tensors(tensors, folder / TENSORS)
    record = {
        "version": 1,
        "kind": "partition",
        "method": partition.method,
        "base": partition.base,
        "experts": partition.experts,
        "layers": {str(n): {"neurons": of.experts.numel(), "shared": of.shared} for n, of in partition.layers.items()},
        "settings": dict(partition.settings),
        "digest": partition.digest(),
    }
    write_json(folder / RECORD, record, indent=1)

"""Partitions as files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from workbench.emergent.partition import LayerPartition, Partition
from workbench.emergent.partition_files import RECORD, TENSORS, write_partition


def test_a_partition_is_written_whole(tmp_path: Path) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).reshape(4, 3).sort(1).values
    layers = {0: LayerPartition(order, 1, order[:, 1]), 2: LayerPartition(order.flip(0), 2)}
    partition = Partition("cmoe", layers, "a" * 32, {"experts": 4, "seed": 0})
    write_partition(tmp_path, partition)
    assert json.loads((tmp_path / RECORD).read_text("utf-8")) == {
        "version": 1,
        "kind": "partition",
        "method": "cmoe",
        "base": "a" * 32,
        "experts": 4,
        "layers": {"0": {"neurons": 12, "shared": 1}, "2": {"neurons": 12, "shared": 2}},
        "settings": {"experts": 4, "seed": 0},
        "digest": partition.digest(),
    }
    tensors = {name: tensor.tolist() for name, tensor in load_file(tmp_path / TENSORS).items()}
    assert tensors == {
        "experts.0": order.tolist(),
        "experts.2": order.flip(0).tolist(),
        "representatives.0": order[:, 1].tolist(),
    }

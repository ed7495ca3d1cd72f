"""Partitions as files: they come back as they were, and damaged or foreign ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.emergent.partition import LayerPartition, Partition
from workbench.emergent.partition_files import RECORD, TENSORS, read_partition, write_partition
from workbench.errors import WorkbenchError


def partition() -> Partition:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).reshape(4, 3).sort(1).values
    return Partition(
        "cmoe",
        {0: LayerPartition(order, 1, order[:, 1]), 2: LayerPartition(order.flip(0), 2)},
        "a" * 32,
        {"experts": 4, "seed": 0},
    )


def test_a_partition_comes_back(tmp_path: Path) -> None:
    write_partition(tmp_path, partition())
    read = read_partition(tmp_path, {0: 12, 2: 12}, "a" * 32)
    assert (read.method, read.base, read.shared, read.experts) == ("cmoe", "a" * 32, (1, 2), 4)
    assert dict(read.settings) == {"experts": 4, "seed": 0}
    assert all(torch.equal(read.layers[n].experts, of.experts) for n, of in partition().layers.items())
    assert read.layers[0].representatives.tolist() == partition().layers[0].experts[:, 1].tolist()  # type: ignore[union-attr]
    assert read.layers[2].representatives is None
    assert read.digest() == partition().digest()


def with_record(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        (folder / RECORD).write_text(json.dumps({**record, **changes}), "utf-8")

    return change


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return save


def swap(tensors: dict[str, torch.Tensor]) -> None:
    tensors["experts.0"] = tensors["experts.0"].flip(0).contiguous()
    tensors["representatives.0"] = tensors["representatives.0"].flip(0).contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / TENSORS).unlink(), "missing or damaged"),
        (lambda folder: (folder / TENSORS).write_bytes(b"damaged"), "missing or damaged"),
        (with_record(kind="neurons"), "expected `kind: partition`"),
        (with_record(base=3), "expected a text or null in `base`"),
        (with_record(layers={"0": {"neurons": 12, "shared": 1}}), "do not belong together"),
        (with_record(layers={"0": {"neurons": 12, "shared": 1}, "2": {"neurons": 12, "shared": 9}}), "its experts are not all"),
        (with_record(layers={"0": {"neurons": 12}, "2": {}}), "no numbers of neurons and shared experts"),
        (with_tensors(swap), "do not belong together"),
        (with_tensors(lambda t: t["experts.0"].zero_()), "its experts are not all of its 12 neurons once"),
        (with_tensors(lambda t: t.pop("experts.2")), "layer 2 has no experts"),
        (with_tensors(lambda t: t["representatives.0"].copy_(t["representatives.0"].flip(0))), "is no neuron of its expert"),
    ],
)
def test_damaged_partitions_are_refused(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write_partition(tmp_path, partition())
    change(tmp_path)
    with pytest.raises(WorkbenchError, match=message):
        read_partition(tmp_path)


def test_a_partition_of_another_model_is_refused(tmp_path: Path) -> None:
    write_partition(tmp_path, partition())
    with pytest.raises(WorkbenchError, match="12 neurons in layer 2, this model has 16"):
        read_partition(tmp_path, {0: 12, 2: 16})
    with pytest.raises(WorkbenchError, match="12 neurons in layer 2, this model has 0"):
        read_partition(tmp_path, {0: 12})
    with pytest.raises(WorkbenchError, match="made on a model with other weights"):
        read_partition(tmp_path, {0: 12, 2: 12}, "b" * 32)

"""Partitions as files: partition.json and partition.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.emergent.files import read_pair
from workbench.emergent.partition import LayerPartition, Partition
from workbench.errors import WorkbenchError
from workbench.files import write_json
from workbench.lazy import torch
from workbench.weights.saving import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

RECORD, TENSORS = "partition.json", "partition.safetensors"
_MADE_BY = "Make it again with `workbench analyze partition`."


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


def read_partition(
    folder: Path, units: Mapping[int, int] | None = None, base: str | None = None, label: str | None = None
) -> Partition:
    """Read a partition that `write_partition` has written.

    Args:
        folder: Its directory.
        units: Layer -> number of neurons of the model that it must belong to; None checks the files alone.
        base: Digest of that model; None skips the comparison of digests.
        label: The partition's name in messages.

    Raises:
        WorkbenchError: If a file is missing or damaged, a layer's experts are not all of its neurons once, the files do not belong
            together, or the partition belongs to another model.
    """
    label = label or str(folder)
    record, tensors = read_pair(folder, RECORD, TENSORS, label, _MADE_BY)
    named, settings, digest = record.get("layers"), record.get("settings"), record.get("base")
    if record.get("kind") != "partition" or not isinstance(named, dict) or not named or not isinstance(settings, dict):
        raise WorkbenchError(f"{label}/{RECORD}: expected `kind: partition`, `layers` and `settings`", _MADE_BY)
    if not isinstance(digest, str | None):
        raise WorkbenchError(f"{label}/{RECORD}: expected a text or null in `base`", _MADE_BY)
    layers = {int(number): _layer(number, of, tensors, label) for number, of in named.items() if number.isdigit()}
    if len({len(layer.experts) for layer in layers.values()}) != 1 or len(layers) != len(named):
        raise WorkbenchError(f"{label}: the layers have different numbers of experts, or no numbers", _MADE_BY)
    partition = Partition(str(record.get("method")), layers, digest, settings)
    if record.get("digest") != partition.digest():
        raise WorkbenchError(f"{label}: {RECORD} and {TENSORS} do not belong together", _MADE_BY)
    check_model(partition, units, base, label)
    return partition


def _layer(number: str, of: Any, tensors: Mapping[str, Tensor], label: str) -> LayerPartition:
    """Return a layer's experts, which must be all of its neurons once."""
    index, stand = tensors.get(f"experts.{number}"), tensors.get(f"representatives.{number}")
    neurons, shared = (of.get("neurons"), of.get("shared")) if isinstance(of, dict) else (None, None)
    if type(neurons) is not int or type(shared) is not int or index is None or index.dim() != 2 or index.is_floating_point():
        raise WorkbenchError(f"{label}: layer {number} has no experts, or no numbers of neurons and shared experts", _MADE_BY)
    experts = index.long()
    if not torch.equal(experts.flatten().sort().values, torch.arange(neurons)) or not 0 <= shared < len(experts):
        raise WorkbenchError(
            f"{label}/{TENSORS}: layer {number}: its experts are not all of its {neurons} neurons once", _MADE_BY
        )
    if stand is not None and (stand.shape != experts.shape[:1] or not (experts == stand[:, None]).any(1).all()):
        raise WorkbenchError(f"{label}/{TENSORS}: layer {number}: a representative is no neuron of its expert", _MADE_BY)
    return LayerPartition(experts, shared, None if stand is None else stand.long())


def check_model(partition: Partition, units: Mapping[int, int] | None, base: str | None, label: str) -> None:
    """Check that a partition belongs to a model.

    Args:
        partition: The partition.
        units: Layer -> number of neurons of the model; None checks nothing.
        base: Digest of the model; None skips the comparison of digests.
        label: Start of the error message.

    Raises:
        WorkbenchError: If it has other layers, other numbers of neurons, or was made on a model with other weights.
    """
    own = {number: layer.experts.numel() for number, layer in partition.layers.items()}
    if units is not None and own != dict(units):
        layer = min(n for n in {*own, *units} if own.get(n) != units.get(n))
        raise WorkbenchError(
            f"{label}: the partition has {own.get(layer, 0)} neurons in layer {layer}, this model has {units.get(layer, 0)}",
            "Divide the neurons of this model: workbench analyze partition.",
        )
    if base and partition.base and base != partition.base:
        raise WorkbenchError(
            f"{label}: the partition was made on a model with other weights or another config.json ({partition.base[:12]}, this model is {base[:12]})",
            "Divide the neurons of this model: workbench analyze partition.",
        )

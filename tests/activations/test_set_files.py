"""Files of a set of neurons: what is written is read, and damaged files are errors that name file and field."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.tiny import edit_json

from workbench.activations.sets import RECORD, TENSORS, NeuronSet, read_set, write_set
from workbench.ground.errors import WorkbenchError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two layers of six neurons, of which one is used."""
    neurons = NeuronSet("math", "neurons", {0: 6, 1: 6}, {1: torch.tensor([0, 4])}, {1: torch.tensor([0.5, 0.25])}, "d" * 32)
    write_set(tmp_path, neurons)
    return tmp_path


def test_round_trip(folder: Path) -> None:
    neurons = read_set(folder)
    assert (neurons.name, neurons.kind, neurons.units, neurons.base) == ("math", "neurons", {0: 6, 1: 6}, "d" * 32)
    assert neurons.indices[1].tolist() == [0, 4]
    assert neurons.scores[1].tolist() == [0.5, 0.25]
    assert (neurons.size, neurons.share) == (2, 2 / 12)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "layers", "expected `kind` and `units`"),
        ("units", {}, "expected `kind` and `units`"),
        ("units", {"0": 6, "²": 6}, "indices outside"),
        ("units", {"0": 6, "1": True}, "indices outside"),
        ("units", {"0": 6, "1": 7}, "do not belong together"),
        ("base", 7, "a text or null in `base`"),
        ("evidence", [1], "an object in `evidence`"),
        ("digest", None, "do not belong together"),
    ],
)
def test_damaged_records(folder: Path, field: str, value: object, message: str) -> None:
    edit_json(folder / RECORD, **{field: value})
    with pytest.raises(WorkbenchError, match=message):
        read_set(folder, "sets/math")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer.1", torch.tensor([0, 6], dtype=torch.int32), "layer 1 has indices outside 0 to 5"),
        ("layer.1", torch.tensor([0, 5], dtype=torch.int32), "do not belong together"),
        ("score.1", torch.tensor([0.5]), "layer 1 has not one score per neuron"),
        ("score.0", torch.tensor([0.5]), "layer 0 has not one score per neuron"),
    ],
)
def test_damaged_tensors(folder: Path, name: str, value: torch.Tensor, message: str) -> None:
    save_file({**load_file(folder / TENSORS), name: value}, folder / TENSORS)
    with pytest.raises(WorkbenchError, match=message):
        read_set(folder, "sets/math")


def test_missing_files(folder: Path) -> None:
    (folder / TENSORS).unlink()
    with pytest.raises(WorkbenchError, match=r"neurons.safetensors: the file is missing"):
        read_set(folder, "sets/math")
    (folder / RECORD).unlink()
    with pytest.raises(WorkbenchError, match=r"neurons.json"):
        read_set(folder, "sets/math")

"""`analyze import` and `analyze export`: sets of neurons in the file form of LAPE, a list over functions of lists over layers of indices.

The form is that of github.com/RUCAIBox/Language-Specific-Neurons (`*.neuron.pth`): `neurons[i][j]` is a LongTensor with the indices of
function i in layer j. It names neither the functions nor the model.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from workbench.activations.labelled import folder_name
from workbench.activations.sets import NeuronSet, neuron_axes, read_set, unit_counts
from workbench.bricks.brick import checkpoint_digest
from workbench.bricks.card import BaseRecord, read_licence, read_title
from workbench.bricks.locate import resolve_base
from workbench.bricks.neuron_sets import neuron_brick, write_neuron_brick
from workbench.errors import UsageError, WorkbenchError
from workbench.files import file_digest, new_directory, write_bytes
from workbench.lazy import torch
from workbench.models.layout import Model
from workbench.neurons import pth_reader
from workbench.project import cache_of
from workbench.results import Number, Part, Result

MADE_BY = "workbench analyze import"
LARGEST = 256 << 20
"""Largest size of a file in bytes; that of a 70 B model has about 2 MiB."""
_FORM = "Expected a list over functions of lists over layers of index tensors, as LAPE's *.neuron.pth."


class ImportedSet(Part):
    """A set of neurons that was read from a file."""

    function: str
    """Its function."""
    set: str
    """Its directory."""
    size: int
    """Number of its neurons."""
    share: Number
    """Share of the model's neurons."""


class ImportedSets(Result):
    """Result of `analyze import`."""

    base: str
    """The base, as it was named."""
    digest: str
    """Digest of its weights and configuration."""
    sets: list[ImportedSet]
    """The sets."""
    empty: list[str]
    """Functions without a neuron, which have no set."""


def read_indices(path: Path, shown: str) -> list[list[list[int]]]:
    """Return the indices of a file by function and layer. The file is opened in a limited process that runs no code of it.

    Raises:
        WorkbenchError: If it is missing, too large, or holds anything but lists of lists of integer tensors.
    """
    try:
        size = path.stat().st_size
    except OSError:
        raise WorkbenchError(f"{shown}: no such file", "Name a *.pth file with lists of lists of tensors.") from None
    if size > LARGEST:
        raise WorkbenchError(f"{shown}: {size:,} bytes, expected at most {LARGEST:,}", _FORM)
    if sys.platform == "win32":
        raise WorkbenchError(f"{shown}: this system cannot limit the process that reads the file", "Import it on Linux or macOS.")
    command = [sys.executable, "-P", pth_reader.__file__, str(path.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10 * pth_reader.SECONDS, check=False)  # noqa: S603  own program
    except subprocess.TimeoutExpired:
        raise WorkbenchError(f"{shown}: reading did not end within {10 * pth_reader.SECONDS} seconds", _FORM) from None
    if done.returncode == 3:
        raise WorkbenchError(f"{shown}: {done.stderr.decode('utf-8', 'replace')[-300:]}", _FORM)
    if done.returncode:
        raise WorkbenchError(
            f"{shown}: the process that reads it ended with status {done.returncode}, within {pth_reader.MEMORY >> 30} GiB of memory and "
            f"{pth_reader.SECONDS} s",
            _FORM,
        )
    found: list[list[list[int]]] = json.loads(done.stdout)
    return found


def import_sets(file: Path, shown: str, base: str, names: Sequence[str], out: Path, *, project: Path) -> ImportedSets:
    """Write the sets of a file as bricks of a base, one directory per function.

    Args:
        file: The file.
        shown: Its name in messages.
        base: Directory or hub id of the model that the neurons belong to.
        names: Names of the functions, in the order of the file.
        out: Directory below which the sets are written.
        project: Directory that relative paths start from.

    Raises:
        WorkbenchError: If the file does not fit the names or the base, or a set's directory exists.
    """
    folders = {name: out / folder_name(name) for name in names}
    if len(set(folders.values())) < len(names):
        raise UsageError(
            f"--names {','.join(names)}: names differ only in case or signs", "Give them names that differ in letters."
        )
    found = read_indices(file, shown)
    if len(found) != len(names):
        raise UsageError(
            f"{shown}: the file has {len(found)} functions, found {len(names)} names",
            "Name each of them in order: --names en,zh,fr",
        )
    checkpoint, _ = resolve_base(base, project)
    model = Model(checkpoint, checkpoint.config)
    axes = neuron_axes(model)
    if any(".experts." in name for name in axes):
        raise WorkbenchError(f"{base}: layers with experts have no neurons in this form", "Use a model without experts.")
    units = unit_counts(axes)
    digest = checkpoint_digest(checkpoint, cache_of(project))
    evidence = {"ranking": "unknown: imported", "data": shown, "data_digest": file_digest(file)}
    sets = {
        name: NeuronSet(
            name, "neurons", units, _checked(layers, units, f"{shown}: {name}", model.layout.depth), {}, digest, evidence
        )
        for name, layers in zip(names, found, strict=True)
    }
    record = BaseRecord(id=base, title=read_title(checkpoint.path), digest=digest)
    rows = []
    written = {name for name, folder in folders.items() if folder.exists()}
    for name in written:  # an interrupted import goes on
        if {n for n in names if sets[n].size} <= written or read_set(folders[name]).digest() != sets[name].digest():
            raise WorkbenchError(f"{folders[name]}: exists already", "Choose a new directory.")
    for name, neurons in sets.items():
        if neurons.size:
            if name not in written:
                with new_directory(folders[name]) as partial:
                    licence = read_licence(checkpoint.path)
                    write_neuron_brick(partial, neurons, record, name=folders[name].name, made_by=MADE_BY, licence=licence)
            rows.append(ImportedSet(function=name, set=str(folders[name]), size=neurons.size, share=neurons.share))
    return ImportedSets(base=base, digest=digest, sets=rows, empty=[name for name in names if not sets[name].size])


def _checked(layers: Sequence[Sequence[int]], units: dict[int, int], label: str, depth: int) -> dict[int, torch.Tensor]:
    """Return layer -> indices, checked against the model."""
    if len(layers) != depth:
        raise WorkbenchError(
            f"{label}: {len(layers)} layers, but the base has {depth}", "Name the model that the file belongs to."
        )
    for layer, index in enumerate(layers):
        if wrong := [i for i in index if not 0 <= i < units.get(layer, 0)]:
            raise WorkbenchError(
                f"{label}: neuron {wrong[0]} of layer {layer} does not exist; the base has {units.get(layer, 0)} there",
                "Name the model that the file belongs to.",
            )
    return {layer: torch.tensor(sorted(set(index))) for layer, index in enumerate(layers) if index}


def export_sets(folders: Sequence[Path], out: Path) -> list[NeuronSet]:
    """Write sets of one model as a file of LAPE's form, in the order of the folders, and return them.

    Args:
        folders: Directories of the sets.
        out: The new file.

    Raises:
        WorkbenchError: If a set has experts, sets belong to different models, or the file exists.
    """
    if out.exists():
        raise WorkbenchError(f"{out}: exists already", "Choose a new file.")
    sets = [neuron_brick(folder)[0] for folder in folders]
    first = sets[0]
    for folder, neurons in zip(folders, sets, strict=True):
        if neurons.kind == "experts":
            raise WorkbenchError(f"{folder}: a set of experts has no neurons in this form", "Export sets of neurons.")
        if dict(neurons.units) != dict(first.units) or (neurons.base and first.base and neurons.base != first.base):
            raise WorkbenchError(f"{folder} and {folders[0]} are sets of different models", "Export sets of one model.")
    none = torch.empty(0, dtype=torch.int64)
    content = [[neurons.indices.get(layer, none).clone() for layer in range(max(first.units) + 1)] for neurons in sets]
    data = io.BytesIO()  # torch reports a full disk without saying so
    torch.save(content, data)
    write_bytes(out, data.getvalue())
    return sets

"""Directories that stand for a GGUF file: its configuration, its tokenizer, and where each tensor of the model lies in the file.

`bricks/gguf_files.py` writes such a directory into the project's cache. It holds config.json and tokenizer files as transformers reads
them, a link to the file, and a record with one line for each tensor under its name in transformers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.files import read_json
from workbench.identity import identity_of
from workbench.weights.header import Entry
from workbench.weights.packing import BOUNDS, Packing
from workbench.weights.specs import DTYPES, TensorSpec

RECORD, LINK = "gguf.json", "model.gguf"
_LISTED = 4  # kinds that a sentence names


def is_gguf(path: Path) -> bool:
    """Return whether a directory stands for a GGUF file."""
    return (path / RECORD).is_file() and (path / LINK).is_symlink()


def gguf_file(path: Path) -> Path:
    """Return the GGUF file that a directory stands for."""
    return (path / LINK).resolve()


def gguf_entries(path: Path, label: str) -> tuple[dict[str, Entry], list[str]]:
    """Return the tensors of a GGUF file under their names in transformers, and sentences on what is read in another form.

    Args:
        path: A directory that stands for a GGUF file.
        label: The checkpoint's name in messages.

    Raises:
        WorkbenchError: If the GGUF file is gone or was changed since the directory was written.
    """
    record = read_json(path / RECORD, stored=str, tensors=dict, identity=list)
    if record is None:
        raise WorkbenchError(f"{label}: {path / RECORD} is damaged", f"Remove {path}: it is made again.")
    file = gguf_file(path)
    identity = identity_of(file) if file.is_file() else None
    if identity is None or identity.storable != record["identity"]:
        problem = "is missing" if identity is None else "has changed"
        raise WorkbenchError(f"{label}: {file} {problem} since it was read first", "Name the GGUF file itself, and run again.")
    entries = {
        name: Entry(file, row["start"], TensorSpec(tuple(row["shape"]), record["stored"]), identity, _packing(row))
        for name, row in record["tensors"].items()
    }
    plain = all(entry.packing is not None and entry.packing.kind == entry.spec.stored for entry in entries.values())
    return entries, [] if plain else [_note(file, entries)]


def _packing(row: dict[str, Any]) -> Packing:
    return Packing(row["kind"], row["nbytes"], heads=row.get("heads", 0), shift=row.get("shift", 0.0))


def _note(file: Path, entries: dict[str, Entry]) -> str:
    """Return the sentence on how the tensors of a file are stored, and what that changed."""
    kinds = Counter(entry.packing.kind for entry in entries.values() if entry.packing)
    dtype = DTYPES[next(iter(entries.values())).spec.stored][0]
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(_LISTED)) + (" …" if len(kinds) > _LISTED else "")
    blocks = [kind for kind in kinds if kind not in DTYPES]
    text = f"{file.name} stores its tensors as {listed}. They are read as {dtype}."
    if not blocks:
        return text
    bits = 8 * sum(entry.nbytes for entry in entries.values()) / sum(entry.spec.numel for entry in entries.values())
    bounds = [f"in {kind} by up to {BOUNDS[kind]}" for kind in blocks if kind in BOUNDS]
    rest = [kind for kind in blocks if kind not in BOUNDS]
    bounds += [f"in {', '.join(rest)} by an amount without a bound that the file states"] if rest else []
    return f"{text} Quantization to {bits:.1f} bits a value changed each value, {' and '.join(bounds)}."

"""Safetensors checkpoints: headers are read first, tensors later, in blocks of rows."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import INDEX, SINGLE, convert_command
from workbench.ground.identity import FileIdentity, check_unchanged
from workbench.ground.lazy import torch
from workbench.ground.project import suggestion
from workbench.ground.recognize import look
from workbench.weights import kernels
from workbench.weights.device import Staging
from workbench.weights.header import Entry, check_config, is_file_name, read_header, refusal
from workbench.weights.packed import PackedSource, fold, gguf_entries, is_gguf, reader_of
from workbench.weights.specs import Source, TensorSpec, as_tensor, typed

if TYPE_CHECKING:
    from torch import Tensor


def checkpoint_files(path: Path, label: str) -> list[Path]:
    """Return the safetensors files of a checkpoint directory.

    Raises:
        WorkbenchError: If there are no safetensors files, or if the index names a missing file or one outside the directory.
    """
    index = path / INDEX
    if (path / SINGLE).is_file():
        if index.is_file():
            _check_same(path / SINGLE, index, label)
        return [path / SINGLE]
    if index.is_file():
        names = sorted(set(_weight_map(index, label).values()))
        for name in names:
            if not is_file_name(name) or ((path / name).resolve().parent != path.resolve() and not _is_hub_blob(path / name)):
                raise WorkbenchError(
                    f"{label}: {index} names a file outside its directory ({name[:80]!r})",
                    "Only file names without a path are read: download the checkpoint again.",
                )
            if not (path / name).is_file():
                raise WorkbenchError(f"{label}: {index} names {name}, which is missing", "Download the checkpoint again.")
        return [path / name for name in names]
    refuse_foreign(path, label)
    other_files = sorted(p.name for p in path.glob("*.safetensors")) if path.is_dir() else []
    raise WorkbenchError(
        f"{label}: no {SINGLE} in {path} and no {INDEX}" + (f" (found {', '.join(other_files[:3])})" if other_files else ""),
        f"Without {INDEX} only {SINGLE} is read: download the files in Hugging Face format."
        if other_files
        else f"Convert a hub repository that has pickle files only: {convert_command(Path('ORG/NAME'))}",
    )


def refuse_foreign(path: Path, label: str, shown: str | Path | None = None) -> None:
    """Raise an error for a directory of another kind than a checkpoint in safetensors, if its kind is known.

    Args:
        path: The directory.
        label: Name of the model in the message.
        shown: The directory's name in the message; None takes its path.

    Raises:
        WorkbenchError: If the directory is of such a kind; the hint is the command that uses or converts it.
    """
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        return
    thing = look(path)
    if thing is not None and thing.kind not in ("checkpoint", "adapter", "brick", "run", "project"):
        raise WorkbenchError(f"{label}: {shown or path} is {thing.says}; expected {SINGLE}", thing.hint)


def _check_same(single: Path, index: Path, label: str) -> None:
    """Check that a single file and an index beside it have the same tensors; the file is then read, as transformers does."""
    in_index, in_file = set(_weight_map(index, label)), set(read_header(single, packed=True))
    if differing := sorted(in_index ^ in_file):
        raise WorkbenchError(
            f"{label}: {single.name} and {index.name} in {single.parent} are of different models: only one of them has {differing[0]} "
            f"({len(differing)} such tensors)",
            "Remove the outdated one.",
        )


def _weight_map(index: Path, label: str) -> dict[str, str]:
    """Return the map from tensor to file of an index."""
    hint = "Download the checkpoint again."
    where = f"{label}: {index} is not an index of safetensors files"
    files = jsondoc.read_object(index, where, hint, unique=True).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise WorkbenchError(f"{where} (no weight_map)", hint)
    return files


def _is_hub_blob(file: Path) -> bool:
    """Return whether a file of a hub snapshot is a link into the cache's blobs directory."""
    return file.is_symlink() and file.resolve().parent.name == "blobs" and file.parent.parent.name == "snapshots"


class Checkpoint:
    """A checkpoint on disk as `Weights`: names and shapes come from headers, tensors are read on demand.

    Attributes:
        streamed: XXH3-128 digests of the tensors that were read completely so far.
        deferred: Descriptions of the checks that were skipped because only headers were downloaded.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label
        self.entries: dict[str, Entry] = {}
        self.left_out: list[str] = []
        """Stored tensors that are ignored: buffers that transformers computes itself."""
        self.notes: list[str] = []
        """Sentences on weights that are stored in fewer bits: how, and what that changed."""
        self.streamed: dict[str, str] = {}
        self.deferred: list[str] = []
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        if is_gguf(path):
            self.entries, self.notes = gguf_entries(path, label)
            return
        self._read_headers()
        folded = fold(self.entries, jsondoc.read_cached(path / "config.json") or {}, path, label)
        self.entries, self.notes = folded.entries, folded.notes

    def _read_headers(self) -> None:
        """Read the headers of all safetensors files."""
        path, label = self.path, self.label
        for file in checkpoint_files(path, label):
            for name, entry in read_header(file, packed=True).items():
                if name in self.entries:
                    raise WorkbenchError(f"{label}: {name} is in both {self.entries[name].file.name} and {file.name}")
                self.entries[name] = entry
        if (
            (path / INDEX).is_file()
            and not (path / SINGLE).is_file()
            and (missing := sorted(set(_weight_map(path / INDEX, label)) - set(self.entries)))
        ):
            raise WorkbenchError(
                f"{label}: {path / INDEX} names {missing[0]}, which no file has ({len(missing)} such tensors)",
                "Download the checkpoint again.",
            )
        self.entries = unwrapped(self.entries, label)

    @property
    def packed(self) -> bool:
        """True if weights are stored in fewer bits, or in a GGUF file. transformers then reads other numbers, or none."""
        return any(entry.packing for entry in self.entries.values())

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, in file order."""
        return {name: entry.spec for name, entry in self.entries.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; see `read_config`."""
        return read_config(self.path, self.label)

    def origin(self, name: str) -> str | None:
        """Return the name itself: bricks address the tensors of a checkpoint by their own names."""
        return name

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor; the reader raises an error at the first NaN or infinity."""
        entry = self.entries[name]
        if entry.packing:
            if not entry.packing.reader:
                return PackedSource(entry, f"{self.label}: {name}", self.read_bytes)
            from workbench.ground.parts import imported

            source: Source = imported(entry.packing.reader)(entry, f"{self.label}: {name}", self.read_bytes)
            return source
        descriptor = self._descriptor(entry.file)
        check_unchanged(descriptor, entry.identity, entry.file)
        if hasattr(os, "posix_fadvise"):  # the kernel reads ahead while the first blocks are computed
            os.posix_fadvise(descriptor, entry.offset, entry.spec.nbytes, os.POSIX_FADV_WILLNEED)
        return FileSource(self, descriptor, name, device)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def read_bytes(self, file: Path, identity: FileIdentity | None, offset: int, size: int) -> bytearray:
        """Read bytes of a file; raise an error if it ends too early or has changed since its header was read."""
        descriptor, data, done = self._descriptor(file), bytearray(size), 0
        view = memoryview(data)
        while done < size:
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise WorkbenchError(
                    f"{file}: the file ends too early", "The file changed while it was read: run the command again."
                )
            done += count
        check_unchanged(descriptor, identity, file)
        return data

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be unloaded when the interpreter exits
        for descriptor in getattr(self, "_descriptors", {}).values():
            close(descriptor)


class FileSource:
    """One stored tensor; implements `specs.StoredSource`. A complete read in order also computes the digest of its bytes."""

    def __init__(self, owner: Checkpoint, descriptor: int, name: str, device: torch.device) -> None:
        self._owner = owner  # keeps the descriptor open
        self._descriptor = descriptor
        self._name = name
        self._entry = owner.entries[name]
        self._staging = Staging(device)
        self._digest = None if name in owner.streamed else xxhash.xxh3_128()
        self._digested = 0

    def raw(self, start: int, stop: int) -> Tensor:
        """Return rows in their stored dtype, on the source's device; the next call overwrites them."""
        spec = self._entry.spec
        width = spec.cols * spec.itemsize
        size = (stop - start) * width
        raw = self._staging.room(size)
        view = raw.numpy().data
        done = 0
        while done < size:
            count = os.preadv(self._descriptor, [view[done:]], self._entry.offset + start * width + done)
            if not count:
                raise WorkbenchError(
                    f"{self._owner.label}: {self._name}: the file ends too early",
                    "The file changed while it was read: run the command again.",
                )
            done += count
        check_unchanged(
            self._descriptor, self._entry.identity, self._entry.file
        )  # takes 1 µs per block and ensures that no changed byte is used
        if self._digest is not None and start == 0:
            self._digest.reset()  # a sample may have been read earlier
            self._digested = 0
        if self._digest is not None and start == self._digested:
            self._digest.update(view)
            self._digested = stop
            if stop == spec.rows:
                self._owner.streamed[self._name] = self._digest.hexdigest()
                self._digest = None
        return self._staging.send(typed(raw, spec.stored).view(stop - start, spec.cols))

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` with rows in float32, or in the stored dtype for integers.

        Raises:
            WorkbenchError: If a value is NaN or infinite.
        """
        raw = self.raw(start, stop)
        if not self._entry.spec.is_float:
            out.copy_(raw)
        elif not kernels.widen(raw, out):
            self.refuse_non_finite(start, stop)

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise WorkbenchError, with the index, if a value in rows start..stop is NaN or infinite."""
        values = as_tensor(self.raw(start, stop))
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, col = bad[0].tolist()
            spec = self._entry.spec
            flat = (start + row) * spec.cols + col
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat), spec.shape)]
            raise WorkbenchError(
                f"{self._owner.label}: {self._name} holds {values[row, col].item()} at {index}; expected finite numbers",
                "Train or download this model again.",
            )


_WRAPPED = re.compile(r"(?:(?<=\.)|^)_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
_PARALLEL = re.compile(r"module\.(?=(?:base_model|model|transformer|gpt_neox|backbone|lm_head|embed_out)\.)")


def unwrapped(entries: Mapping[str, Entry], label: str, parts: re.Pattern[str] | None = None) -> dict[str, Entry]:
    """Return tensors by their names without what wrappers of a training add to them.

    These are `_orig_mod` (torch.compile) anywhere, and `module.` (data parallelism) if all names begin with it and with a model's root.

    Args:
        entries: The tensors.
        label: Name of the model in messages.
        parts: Pattern of names that end in `.default`, which is removed: PEFT's name for the adapter in a model in memory.

    Raises:
        WorkbenchError: If two tensors then have one name.
    """
    names = {name: _WRAPPED.sub("", name) for name in entries}
    if all(_PARALLEL.match(name) for name in names.values()):
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    if parts is not None:
        names = {name: parts.sub(r"\1", short) for name, short in names.items()}
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        if names[name] in found:
            raise WorkbenchError(
                f"{label}: {name} and another tensor are both {names[name]}, without the prefixes of a training", "Save it again."
            )
        found[names[name]] = entry
    return found


def read_config(path: Path, label: str) -> dict[str, Any]:
    """Read and check config.json of a checkpoint directory. `quantization_config` is left out if its weights are read here.

    Raises:
        WorkbenchError: If the file is missing or invalid, or if the model is quantized in another way.
    """
    file = path / "config.json"
    try:
        config = jsondoc.read_object(file, f"{label}: {file}", infinite=True, unique=True)
    except FileNotFoundError:
        refuse_foreign(path, label)
        raise WorkbenchError(
            f"{label}: no config.json in {path}",
            suggestion(path) or "Expected a Hugging Face model directory: config.json and safetensors files.",
        ) from None
    check_config(config, f"{label}: {file}")
    quantization = config.get("quantization_config") or config.get("compression_config")
    if reader_of(quantization):
        return {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if quantization:
        raise refusal(quantization, path, label)
    return config

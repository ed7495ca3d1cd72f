"""Writes weights as a safetensors checkpoint: headers first, then each tensor at its offset, block by block.

All offsets are known before any tensor is computed. Memory therefore does not grow with the model, threads can write in any order, and
an interrupted write can be resumed. The bytes do not depend on threads or interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest, naming_file, sync, write_text
from workbench.ground.foreign_names import INDEX, SINGLE
from workbench.ground.identity import installed
from workbench.ground.lazy import torch
from workbench.weights import kernels
from workbench.weights.device import Landing, each
from workbench.weights.digests import entry_digest
from workbench.weights.header import Entry, read_header
from workbench.weights.kernels import backend
from workbench.weights.specs import TensorSpec, Weights, block_elements, buffer, matrix, stored_name

JOURNAL = "journal.jsonl"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Shard:
    """The name of one output file, and its tensors in order."""

    name: str
    specs: dict[str, TensorSpec]

    def header(self) -> bytes:
        """Return the first bytes of the file: a length and the JSON that describes the tensors."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, spec in self.specs.items():
            header[name] = {"dtype": spec.written, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """The size of the tensor data in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass(frozen=True)
class Written:
    """Digests of a checkpoint that was written.

    Attributes:
        digests: Tensor -> its XXH3-128.
        sha256: File -> its SHA-256. A file is missing here if it could not be read while it was written.
    """

    digests: dict[str, str]
    sha256: dict[Path, str]


def output_specs(specs: Mapping[str, TensorSpec], dtype: torch.dtype | str | None) -> dict[str, TensorSpec]:
    """Return the output's specs: floating-point tensors in `dtype` (None keeps each tensor's dtype), others unchanged."""
    stored = stored_name(dtype) if dtype else None
    return {n: TensorSpec(s.shape, stored) if stored and s.is_float else s for n, s in specs.items()}


def plan_shards(specs: Mapping[str, TensorSpec], shard_size: int) -> list[Shard]:
    """Distribute tensors over files of at most `shard_size` bytes, in order; a larger tensor gets its own file."""
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def write_checkpoint(
    weights: Weights,
    out: Path,
    *,
    dtype: torch.dtype | str | None,
    shard_size: int,
    device: torch.device,
    threads: int,
    progress: Progress | None = None,
) -> Written:
    """Write all tensors to a directory, resuming an interrupted write there.

    Args:
        weights: The weights.
        out: The directory. The caller must ensure that an interrupted write there had the same inputs.
        dtype: The dtype of floating-point tensors, or its name in torch; None keeps the dtype of each tensor.
        shard_size: Largest size of a file in bytes.
        device: The device that computes the tensors.
        threads: Number of threads.
        progress: Called with the bytes written so far and the bytes in all.

    Returns:
        The digests of tensors and files as written.

    Raises:
        WorkbenchError: If a result is not finite in its dtype.
    """
    out.mkdir(parents=True, exist_ok=True)
    specs = output_specs(weights.specs, dtype)
    shards = plan_shards(specs, shard_size)
    # A reader would take files of an interrupted write with another shard size for part of this checkpoint.
    names = {shard.name for shard in shards}
    for file in (*out.glob("*.safetensors"), *out.glob(INDEX)):
        if file.name not in names:
            file.unlink()
    places = {name: entry for shard in shards for name, entry in _lay_out(out, shard).items()}
    journal = _Journal(out / JOURNAL, layout_digest(shards, device), places)
    unwritten = [name for name in specs if name not in journal.digests]
    total = sum(spec.nbytes for spec in specs.values())
    done = total - sum(specs[name].nbytes for name in unwritten)
    lock = threading.Lock()

    def write(name: str) -> None:
        nonlocal done
        digest = _write_tensor(weights, name, places[name], device)
        hasher.written(name)
        with lock:
            journal.add(name, digest)
            done += specs[name].nbytes
            flusher.written(specs[name].nbytes)
            if progress:
                progress(done, total)

    with _Hasher(out, shards, journal.digests) as hasher, _Flusher([out / shard.name for shard in shards]) as flusher:
        each(write, unwritten, threads, device)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: s.name for s in shards for n in s.specs}}
        write_text(out / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    journal.close()
    return Written({name: journal.digests[name] for name in specs}, hasher.sums)


def layout_digest(shards: list[Shard], device: torch.device) -> str:
    """Return a digest of the files' headers and of what computes them; only a journal with the same digest is resumed.

    Devices, releases of torch and compiled loops may differ in the last bits of sums and products, so one file must not mix them.
    """
    computed = [device.type, installed("torch", "brick-workbench"), backend().name]
    return json_digest([*computed, *([shard.name, shard.header().hex()] for shard in shards)])


def _lay_out(out: Path, shard: Shard) -> dict[str, Entry]:
    """Create a file with its header and full size, or keep the file of an interrupted write."""
    file = out / shard.name
    header = shard.header()
    size = len(header) + shard.nbytes
    if not file.exists() or file.stat().st_size != size or _read_start(file, len(header)) != header:
        with naming_file(file), file.open("wb") as stream:
            stream.write(header)
            stream.truncate(size)
    found = read_header(file, watched=False, packed=True)
    return {name: replace(entry, spec=shard.specs[name], packing=None) for name, entry in found.items()}


def _read_start(file: Path, size: int) -> bytes:
    """Return the first bytes of a file."""
    with file.open("rb") as stream:
        return stream.read(size)


def _write_tensor(weights: Weights, name: str, place: Entry, device: torch.device) -> str:
    """Compute one tensor, cast it, write it to its place, and return its digest."""
    spec = place.spec
    digest = xxhash.xxh3_128()
    source = weights.open(name, device)
    work = buffer(TensorSpec(spec.shape, weights.specs[name].stored), device)
    landing = Landing(work.numel(), spec.stored, device)
    descriptor = os.open(place.file, os.O_WRONLY)
    try:
        offset = place.offset
        for start, stop in spec.blocks(block_elements(device)):
            block = matrix(work, start, stop, spec.cols)
            source.read(start, stop, block)
            result = landing.rounded(block)
            if not spec.is_float:
                result.copy_(block)
            elif not kernels.narrow(block, result):
                raise WorkbenchError(
                    f"{name}: the result is not finite in {spec.stored} (rows {start}-{stop})",
                    "Lower the step's lambda or weights, or set `output: {dtype: float32}`.",
                )
            data = landing.bytes_of(result)
            digest.update(data)
            while data:
                with naming_file(place.file):
                    count = os.pwrite(descriptor, data, offset)
                offset += count
                data = data[count:]
    finally:
        os.close(descriptor)
    return digest.hexdigest()


class _Flusher:
    """Flushes files to disk while they are written, and all of them at the end.

    Otherwise the fsync at the end takes over a second for 3 GB of results.
    """

    STEP = 256 << 20

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._unsynced = 0
        self._wake, self._stop = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def written(self, size: int) -> None:
        """Record that `size` more bytes were written."""
        self._unsynced += size
        if self._unsynced >= self.STEP:
            self._unsynced = 0
            self._wake.set()

    def __enter__(self) -> _Flusher:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop = True
        self._wake.set()
        self._thread.join()
        for file in self._files if kind is None else ():
            sync(file)

    def _run(self) -> None:
        while self._wake.wait() and not self._stop:
            self._wake.clear()
            for file in self._files:
                sync(file)


class _Hasher:
    """Hashes files while they are written: a thread follows the finished tensors in the order of the files.

    Hashing at the end would read the result again; the thread reads what the system still has in memory.
    """

    def __init__(self, out: Path, shards: list[Shard], finished: Iterable[str]) -> None:
        self.sums: dict[Path, str] = {}
        self._out, self._shards, self._finished = out, shards, set(finished)
        self._changed, self._stop = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def written(self, tensor: str) -> None:
        """Record that a tensor is complete in its file."""
        with self._changed:
            self._finished.add(tensor)
            self._changed.notify()

    def __enter__(self) -> _Hasher:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._stop = kind is not None
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        for shard in self._shards:
            # without a buffer, which would hold bytes from before the next tensor was written
            with contextlib.suppress(OSError), (self._out / shard.name).open("rb", buffering=0) as stream:
                digest = hashlib.sha256(stream.read(len(shard.header())))
                for name, spec in shard.specs.items():
                    with self._changed:
                        while not self._stop and name not in self._finished:
                            self._changed.wait()
                    left = spec.nbytes
                    while left and not self._stop and (data := stream.read(min(left, 1 << 20))):
                        digest.update(data)
                        left -= len(data)
                    if left:
                        return
                self.sums[self._out / shard.name] = digest.hexdigest()


class _Journal:
    """The record of complete tensors with their digests, which are checked against the files when a write is resumed."""

    def __init__(self, path: Path, layout: str, places: Mapping[str, Entry]) -> None:
        self.path = path
        self.digests: dict[str, str] = {}
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
        if lines and lines[0] == json.dumps({"layout": layout}):
            for line in lines[1:]:
                try:
                    row = jsondoc.parse(line, str(path))
                except WorkbenchError:
                    break  # the line was cut by the interruption
                if not isinstance(row, dict) or not isinstance(row.get("tensor"), str) or row["tensor"] not in places:
                    break
                if entry_digest(places[row["tensor"]]) == row.get("digest"):
                    self.digests[row["tensor"]] = row["digest"]
        self._stream = path.open("w", encoding="utf-8")
        self._stream.write(json.dumps({"layout": layout}) + "\n")
        for name, digest in self.digests.items():
            self.add(name, digest)
        self._stream.flush()

    def add(self, name: str, digest: str) -> None:
        self.digests[name] = digest
        with naming_file(self.path):
            self._stream.write(json.dumps({"tensor": name, "digest": digest}) + "\n")
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()
        self.path.unlink()

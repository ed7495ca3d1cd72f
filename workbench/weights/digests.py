"""Content digests: XXH3-128 of a tensor's bytes, of a checkpoint, of a configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from workbench import jsondoc
from workbench.errors import WorkbenchError
from workbench.weights.checkpoint import Entry
from workbench.weights.specs import NAMES, TensorSpec

# Fields of config.json that say how a file came about, not what the model computes.
_BOOKKEEPING = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})


def json_digest(value: Any) -> str:
    """Digest of plain data: XXH3-128 of its canonical JSON, 32 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def file_digest(path: Path) -> str:
    """Digest of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def entry_digest(entry: Entry) -> str:
    """Digest of one stored tensor's bytes."""
    digest = xxhash.xxh3_128()
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        left = entry.spec.nbytes
        while left:
            chunk = stream.read(min(1 << 20, left))
            if not chunk:
                raise WorkbenchError(f"{entry.file}: ends early", "The file changed while it was read: fetch it again.")
            left -= len(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Digest of a tensor in memory: that of the same tensor on disk."""
    return xxhash.xxh3_128_hexdigest(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def tensor_digests(
    entries: Mapping[str, Entry], cache: Path | None = None, streamed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Digest of every stored tensor of a checkpoint or adapter.

    Args:
        entries: Where the tensors lie.
        cache: Where digests are remembered under each file's path, size and modification time (in ns), so that an unchanged
            file is read once; a file that differs in any of them is read again.
        streamed: Digests that were taken while tensors were read for something else.
    """
    digests: dict[str, str] = {}
    for here in _by_file(entries):
        memo = _memo(here, cache) if cache else None
        found = read_json(memo) if memo else None
        if found is None or found.keys() != here.keys() or not all(isinstance(digest, str) for digest in found.values()):
            found = {name: (streamed or {}).get(name) or entry_digest(entry) for name, entry in here.items()}
            if memo:
                write_json(memo, found)
        digests.update(found)
    return digests


def digests_known(entries: Mapping[str, Entry], cache: Path) -> bool:
    """Whether `tensor_digests` would read nothing."""
    return all(_memo(here, cache).is_file() for here in _by_file(entries))


def stamp(entries: Mapping[str, Entry]) -> str:
    """What stands for the content of files that have not been read: path, size and modification time of each."""
    return json_digest([_identity(here) for here in _by_file(entries)])


def fingerprint(entries: Mapping[str, Entry]) -> str:
    """A key of some tensors' content without reading it all: names, shapes, and 64 bytes at four places of up to 256 tensors.

    It orders bricks and seeds random masks. It does not depend on files and shards; equal for models that differ elsewhere only.
    """
    names = sorted(entries)
    digest = xxhash.xxh3_128(json.dumps([[n, list(entries[n].spec.shape), NAMES[entries[n].spec.dtype]] for n in names]).encode())
    descriptors: dict[Path, int] = {}
    try:
        for name in names[:: max(1, len(names) // 256)]:
            entry = entries[name]
            if entry.file not in descriptors:
                descriptors[entry.file] = os.open(entry.file, os.O_RDONLY)
            for place in range(4):
                offset = entry.spec.nbytes * (2 * place + 1) // 8 // 64 * 64
                digest.update(os.pread(descriptors[entry.file], min(64, entry.spec.nbytes - offset), entry.offset + offset))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()


def _by_file(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
    groups: dict[Path, dict[str, Entry]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.file, {})[name] = entry
    return list(groups.values())


def _identity(here: Mapping[str, Entry]) -> list[Any]:
    file = next(iter(here.values())).file
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns, sorted(here)]


def _memo(here: Mapping[str, Entry], cache: Path) -> Path:
    return cache / "digests" / f"{json_digest(_identity(here))}.json"


def read_json(path: Path, **needs: type | tuple[type, ...]) -> dict[str, Any] | None:
    """An object that the workbench has kept, with the fields that its reader needs.

    Args:
        path: The file.
        needs: Field -> its type, or several.

    Returns:
        The object; None where the file is missing, damaged, or lacks a field, so that what it holds is computed again.
    """
    found = jsondoc.kept(path)
    return found if found is not None and all(isinstance(found.get(key), kind) for key, kind in needs.items()) else None


def write_json(path: Path, data: Any, indent: int | None = None) -> None:
    """Write JSON whole or not at all: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=indent, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def weights_digest(specs: Mapping[str, TensorSpec], digests: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Digest of a model: names, dtypes, shapes, bytes of all tensors and the configuration that gives them meaning."""
    tensors = sorted((n, NAMES[s.dtype], list(s.shape), digests[n]) for n, s in specs.items())
    meaning = {k: v for k, v in config.items() if k not in _BOOKKEEPING}
    return json_digest({"tensors": tensors, "config": meaning})

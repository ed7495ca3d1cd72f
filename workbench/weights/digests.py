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

from workbench.errors import WorkbenchError
from workbench.files import json_digest, read_json, write_json
from workbench.identity import check_unchanged, identity_of, unchanged
from workbench.weights.checkpoint import Entry
from workbench.weights.specs import NAMES, TensorSpec

# Fields of config.json that say how a file came about, not what the model computes.
_BOOKKEEPING = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})


def entry_digest(entry: Entry) -> str:
    """Digest of one stored tensor's bytes. Errors: the file is not the one whose header was read."""
    digest = xxhash.xxh3_128()
    with entry.file.open("rb") if entry.identity is None else unchanged(entry.file, entry.identity) as stream:
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
        entries: Where the tensors lie, and the identity of each file when its header was read.
        cache: Where digests are remembered under each file's path, inode, size and times (in ns), so that an unchanged file is
            read once; a file that differs in any of them is read again.
        streamed: Digests that were taken while tensors were read for something else; the reader compared the same identities.

    Raises:
        InputChangedError: A file is no longer the one whose header was read.
    """
    digests: dict[str, str] = {}
    for here in _by_file(entries):
        memo = _memo(here, cache) if cache else None
        found = read_json(memo) if memo else None
        if found is None or found.keys() != here.keys() or not all(isinstance(digest, str) for digest in found.values()):
            found = {name: (streamed or {}).get(name) or entry_digest(entry) for name, entry in here.items()}
            first = next(iter(here.values()))
            check_unchanged(first.file, first.identity, first.file)
            if memo:
                write_json(memo, found)
        digests.update(found)
    return digests


def digests_known(entries: Mapping[str, Entry], cache: Path) -> bool:
    """Whether `tensor_digests` would read nothing."""
    return all(_memo(here, cache).is_file() for here in _by_file(entries))


def stamp(entries: Mapping[str, Entry]) -> str:
    """Key that stands for the content of files before they are read: path, inode, size and times of each."""
    return json_digest([_identity(here) for here in _by_file(entries)])


def fingerprint(entries: Mapping[str, Entry]) -> str:
    """A sort key of tensors without reading them all: names, shapes, and 64 bytes at four places of up to 256 tensors.

    It puts bricks into an order that does not depend on files and shards, and must decide nothing else: models that differ
    elsewhere have the same one.
    """
    names = sorted(entries)
    digest = xxhash.xxh3_128(json.dumps([[n, list(entries[n].spec.shape), NAMES[entries[n].spec.dtype]] for n in names]).encode())
    descriptors: dict[Path, int] = {}
    try:
        for name in names[:: max(1, len(names) // 256)]:
            entry = entries[name]
            if entry.file not in descriptors:
                descriptors[entry.file] = os.open(entry.file, os.O_RDONLY)
                check_unchanged(descriptors[entry.file], entry.identity, entry.file)
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
    first = next(iter(here.values()))
    identity = first.identity or identity_of(first.file)
    return [str(first.file.resolve()), *identity.kept, sorted(here)]


def _memo(here: Mapping[str, Entry], cache: Path) -> Path:
    return cache / "digests" / f"{json_digest(_identity(here))}.json"


def weights_digest(specs: Mapping[str, TensorSpec], digests: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Digest of a model: names, dtypes, shapes, bytes of all tensors and the configuration that gives them meaning."""
    tensors = sorted((n, NAMES[s.dtype], list(s.shape), digests[n]) for n, s in specs.items())
    meaning = {k: v for k, v in config.items() if k not in _BOOKKEEPING}
    return json_digest({"tensors": tensors, "config": meaning})

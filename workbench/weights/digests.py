"""XXH3-128 digests of tensors, checkpoints and configurations."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest, read_memo, write_memo
from workbench.ground.identity import check_unchanged, open_unchanged, settled
from workbench.ground.lazy import torch
from workbench.weights.header import Entry
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

# Fields of config.json that describe how a file was made, not what the model computes.
_BOOKKEEPING = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})


def entry_digest(entry: Entry) -> str:
    """Return the digest of one stored tensor's bytes. For a packed tensor it includes the scales, and how they are applied."""
    if entry.packing is None:
        return _bytes_digest(entry)
    beside = [*map(_bytes_digest, entry.packing.companions())] or (None,)
    return json_digest([_bytes_digest(entry), entry.packing.meaning(), *beside])


def _bytes_digest(entry: Entry) -> str:
    """Return the digest of the bytes of a tensor in a file, without its scales."""
    digest = xxhash.xxh3_128()
    with entry.file.open("rb") if entry.identity is None else open_unchanged(entry.file, entry.identity) as stream:
        stream.seek(entry.offset)
        left = entry.nbytes
        while left:
            chunk = stream.read(min(1 << 20, left))
            if not chunk:
                raise WorkbenchError(
                    f"{entry.file}: the file ends too early", "The file changed while it was read: download it again."
                )
            left -= len(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor in memory, equal to that of the same tensor on disk."""
    return xxhash.xxh3_128_hexdigest(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def tensor_digests(
    entries: Mapping[str, Entry], cache: Path | None = None, streamed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the digest of every stored tensor of a checkpoint or adapter.

    Args:
        entries: The tensors, with the identity of each file when its header was read.
        cache: Cache directory. Digests are stored there under each file's path and identity, so that an unchanged file is read only
            once, where its times tell of changes (`FileIdentity.is_telling`). None uses no cache.
        streamed: Known digests, computed while the tensors were read for another purpose.

    Raises:
        InputChangedError: If a file has changed since its header was read.
    """
    digests: dict[str, str] = {}
    for group in _by_file(entries):
        first, memo = next(iter(group.values())), _Memo.for_file(group, cache)
        cached = memo.read()
        if cached is None or cached.keys() != group.keys():
            cached = {name: (streamed or {}).get(name) or entry_digest(entry) for name, entry in group.items()}
            check_unchanged(first.file, first.identity, first.file)
            memo.write(cached)
        digests.update(cached)
    return digests


def digests_known(entries: Mapping[str, Entry], cache: Path) -> bool:
    """Return whether the digests of all files are remembered."""
    memos = (_Memo.for_file(group, cache) for group in _by_file(entries))
    return all(memo.key in _READ or (memo.file is not None and not _rehashes and memo.file.is_file()) for memo in memos)


def rehash() -> None:
    """Read every input again in this process, instead of trusting digests that are remembered under the times of files."""
    global _rehashes
    _rehashes = True
    _READ.clear()


_rehashes = False
# Digests that this process has read and may not take from the cache: key of a file's identity -> tensor -> digest.
_READ: dict[str, dict[str, str]] = {}
# A file whose times tell little is remembered within this process, once a clock of two seconds would show another write.
_COARSE_NS = 2_000_000_000


@dataclass(frozen=True)
class _Memo:
    """The digests of one file's tensors, remembered under the file's path and identity: on disk where its times tell of changes."""

    key: str
    file: Path | None
    within: bool
    """Whether it is remembered within this process alone."""

    @classmethod
    def for_file(cls, group: Mapping[str, Entry], cache: Path | None) -> _Memo:
        first, key = next(iter(group.values())), json_digest(_identity(group))
        identity = first.identity or settled(first.file)
        tells, age = identity.is_telling, time.time_ns() - max(identity.mtime_ns, identity.ctime_ns)
        return cls(key, cache / "digests" / f"{key}.json" if cache and tells else None, not tells and age > _COARSE_NS)

    def read(self) -> dict[str, str] | None:
        if self.key in _READ:
            return _READ[self.key]
        found = read_memo(self.file) if self.file and not _rehashes else None
        return found if found is not None and all(isinstance(digest, str) for digest in found.values()) else None

    def write(self, digests: dict[str, str]) -> None:
        if self.file:
            write_memo(self.file, digests)
        if _rehashes or self.within:
            _READ[self.key] = digests


def stamp(entries: Mapping[str, Entry]) -> str:
    """Return a key for the content of files that needs no read of them: a digest of each file's path, inode, size and times."""
    return json_digest([_identity(group) for group in _by_file(entries)])


def fingerprint(entries: Mapping[str, Entry]) -> str:
    """Return a sort key of a model, made of names, shapes, and 64 bytes at four places of up to 256 tensors.

    It gives bricks an order that does not depend on files and shards. It identifies nothing: models that differ only in other places
    have the same fingerprint.
    """
    names = sorted(entries)
    digest = xxhash.xxh3_128(json.dumps([[n, list(entries[n].spec.shape), entries[n].spec.stored] for n in names]).encode())
    descriptors: dict[Path, int] = {}
    try:
        for name in names[:: max(1, len(names) // 256)]:
            entry = entries[name]
            if entry.file not in descriptors:
                descriptors[entry.file] = os.open(entry.file, os.O_RDONLY)
                check_unchanged(descriptors[entry.file], entry.identity, entry.file)
            size, start = entry.nbytes, entry.offset
            for place in range(4):
                offset = size * (2 * place + 1) // 8 // 64 * 64
                digest.update(os.pread(descriptors[entry.file], min(64, size - offset), start + offset))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()


def _by_file(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
    """Group entries by the file that they are in."""
    groups: dict[Path, dict[str, Entry]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.file, {})[name] = entry
    return list(groups.values())


def _identity(group: Mapping[str, Entry]) -> list[Any]:
    """Return the path and identity of the one file that a group of entries is in, and the entries' names and packings."""
    first = next(iter(group.values()))
    identity = first.identity or settled(first.file)
    packed = {name: entry.packing.identity() for name, entry in group.items() if entry.packing}
    return [str(first.file.resolve()), *identity.storable, sorted(group), *([packed] if packed else [])]


def weights_digest(specs: Mapping[str, TensorSpec], digests: Mapping[str, str], config: Mapping[str, object]) -> str:
    """Return the digest of a model: of all tensors' names, dtypes, shapes and bytes, and of its configuration.

    Args:
        specs: Shape and dtype of every tensor.
        digests: Digest of every tensor's bytes.
        config: The content of config.json. Fields that do not change what the model computes are ignored.
    """
    tensors = sorted((n, s.stored, list(s.shape), digests[n]) for n, s in specs.items())
    return json_digest({"tensors": tensors, "config": meaning_of(config)})


def meaning_of(config: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of config.json that decide what a model computes: all but those that say how its files were made."""
    return {key: value for key, value in config.items() if key not in _BOOKKEEPING}

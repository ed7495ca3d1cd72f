"""File identities: how a reader notices that a file changed between its header, its tensors and its digest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from workbench.errors import WorkbenchError

# Kernels stamp files with a clock that ticks every 1 to 10 ms: a second write within one tick leaves the same times.
_TICKS_NS = 20_000_000
_RETRY = "Wait until no other program writes to it, then run the same command again: finished work is kept."


class InputChangedError(WorkbenchError):
    """A file changed while a command was reading it."""


class FileIdentity(NamedTuple):
    """What fstat says of an open file. A write, a replacement and a copy with preserved times each change at least one field."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def kept(self) -> list[int]:
        """Return the fields for keys that are stored on disk; device numbers may change when a machine restarts."""
        return list(self[1:])


def identity_of(file: int | Path) -> FileIdentity:
    """Return the identity of a path or of an open descriptor."""
    stat = os.fstat(file) if isinstance(file, int) else file.stat()
    return FileIdentity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def settled_identity(descriptor: int) -> FileIdentity:
    """Return the identity of an open file, after its time stamps are old enough for a later write to change them."""
    found = identity_of(descriptor)
    left = found.ctime_ns + _TICKS_NS - time.time_ns()
    if 0 < left <= _TICKS_NS:
        time.sleep(left / 1e9)
        found = identity_of(descriptor)
    return found


def check_unchanged(file: int | Path, expected: FileIdentity | None, path: Path) -> None:
    """Raise InputChangedError if a file no longer has the expected identity; None expects nothing."""
    if expected is None:
        return
    try:
        found = identity_of(file)
    except FileNotFoundError:
        raise InputChangedError(f"{path}: the file was removed while this command was using it", _RETRY) from None
    if found != expected:
        raise InputChangedError(f"{path}: the file changed while this command was reading it", _RETRY)


@contextmanager
def unchanged(path: Path, expected: FileIdentity | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading and raise InputChangedError if it changes before the block ends.

    Args:
        path: The file.
        expected: The identity that it had earlier; None: that which it has now.
    """
    with path.open("rb") as stream:
        expected = expected or settled_identity(stream.fileno())
        check_unchanged(stream.fileno(), expected, path)
        yield stream
        check_unchanged(stream.fileno(), expected, path)


class WatchedFiles:
    """The small input files of a recipe (facts, texts, tokenizers): digested early, read later, checked at the end."""

    def __init__(self) -> None:
        self._known: dict[Path, FileIdentity] = {}

    def read(self, path: Path) -> bytes:
        """Return a file's bytes and watch it. Raises InputChangedError if it changed since it was read first."""
        with unchanged(path, self._known.get(path)) as stream:
            self._known.setdefault(path, identity_of(stream.fileno()))
            return stream.read()

    def check(self) -> None:
        """Raise InputChangedError if a watched file changed or was removed."""
        for path, expected in self._known.items():
            check_unchanged(path, expected, path)

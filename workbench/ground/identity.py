"""Identities of files, by which a reader notices that a file changed between two reads, and versions of libraries."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO, NamedTuple

from workbench.ground.errors import WorkbenchError

# The clock of file time stamps ticks every 1 to 10 ms: two writes within one tick have the same times.
_TICKS_NS = 20_000_000
_RETRY = "Wait until no other program writes to the file, then run the same command again. Finished work is kept."


class InputChangedError(WorkbenchError):
    """The error for a file that changed while a command was using it."""


class FileIdentity(NamedTuple):
    """The fields of fstat that identify a file's content: a write, a replacement or a copy changes at least one of them."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    system: int
    """The file system's id."""
    read_only: bool
    """Whether the file system is mounted read-only."""

    @property
    def storable(self) -> list[int]:
        """Return the fields that may be stored on disk. The device number is left out: it can change when a machine restarts."""
        return [self.system, *self[1:5]]

    @property
    def is_telling(self) -> bool:
        """Return whether another content would have other times, so that what was read once may be remembered for later commands.

        The kernel sets ctime at every write, but not everywhere: some file systems have seconds only, and some images have no ctime and
        show the mtime, which their maker chose. A file that was written within the last tick may be written again within it.
        """
        fine = self.ctime_ns % 1_000_000_000 != 0
        own = not self.read_only or self.ctime_ns != self.mtime_ns
        return fine and own and time.time_ns() - self.ctime_ns > _TICKS_NS


def identity_of(file: int | Path) -> FileIdentity:
    """Return the identity of a path or of an open descriptor."""
    stat = os.fstat(file) if isinstance(file, int) else file.stat()
    system = os.statvfs(file)
    times = stat.st_mtime_ns, stat.st_ctime_ns
    return FileIdentity(stat.st_dev, stat.st_ino, stat.st_size, *times, system.f_fsid, bool(system.f_flag & os.ST_RDONLY))


def settled_identity(descriptor: int) -> FileIdentity:
    """Wait until a later write would change the time stamps of an open file, then return the file's identity."""
    identity = identity_of(descriptor)
    left = identity.ctime_ns + _TICKS_NS - time.time_ns()
    if 0 < left <= _TICKS_NS:
        time.sleep(left / 1e9)
        identity = identity_of(descriptor)
    return identity


def settled(path: Path) -> FileIdentity:
    """Return the same for a path."""
    with path.open("rb") as stream:
        return settled_identity(stream.fileno())


def check_unchanged(file: int | Path, expected: FileIdentity | None, path: Path) -> None:
    """Check that a file still has the expected identity; do nothing if that is None.

    Raises:
        InputChangedError: If the file was changed or removed.
    """
    if expected is None:
        return
    try:
        actual = identity_of(file)
    except FileNotFoundError:
        raise InputChangedError(f"{path}: the file was removed while this command was using it", _RETRY) from None
    if actual != expected:
        raise InputChangedError(f"{path}: the file changed while this command was reading it", _RETRY)


@contextmanager
def open_unchanged(path: Path, expected: FileIdentity | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading and check that it does not change before the block ends.

    Args:
        path: The file.
        expected: The identity that the file had earlier; None takes the current one.

    Raises:
        InputChangedError: If the file differs from `expected` or changes before the block ends.
    """
    with path.open("rb") as stream:
        expected = expected or settled_identity(stream.fileno())
        check_unchanged(stream.fileno(), expected, path)
        yield stream
        check_unchanged(stream.fileno(), expected, path)


class WatchedFiles:
    """The small input files of a recipe (facts, texts, tokenizers), checked for changes between their first read and the end."""

    def __init__(self) -> None:
        self._known: dict[Path, FileIdentity] = {}

    def read(self, path: Path) -> bytes:
        """Read a file and watch it from now on.

        Raises:
            InputChangedError: If the file changed since the first read.
        """
        with open_unchanged(path, self._known.get(path)) as stream:
            self._known.setdefault(path, identity_of(stream.fileno()))
            return stream.read()

    def check(self) -> None:
        """Check all watched files.

        Raises:
            InputChangedError: If a file was changed or removed.
        """
        for path, expected in self._known.items():
            check_unchanged(path, expected, path)


def installed(*packages: str) -> dict[str, str]:
    """Map each package to its installed version, or to "not installed"; nothing is imported."""
    return {package: _version(package) for package in packages}


@cache
def _version(package: str) -> str:
    """Return a package's installed version, or "not installed"; the package's metadata takes milliseconds to parse."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

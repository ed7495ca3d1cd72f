"""JSON files, digests of content, and atomic writes.

Every operating system error raised here names its file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import io
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError, size
from workbench.ground.identity import open_unchanged

MAX_UNPACKED = 2 << 30
"""Largest content of a compressed file, in bytes."""
_SURELY_SMALL = 64 << 10
_SUM = "xxh3"
SCRATCH = ".making-"
"""Prefix of the folders of `scratch_beside`."""
UNFINISHED = re.compile(r"\.(.+)\.\d+")
"""Names that `atomic_write` gives to files that it has not finished."""
_ABANDONED = 3600  # seconds without a change after which nothing is being written any more
_abandoned: dict[str, dict[str, list[str]]] = {}  # folder -> file -> what killed processes have left of it there


def json_digest(value: Any) -> str:
    """Return the XXH3-128 of plain data, written as canonical JSON, as 32 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def bytes_digest(data: bytes) -> str:
    """Return the digest of bytes in memory, equal to that of a file with the same bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes.

    Raises:
        InputChangedError: If the file changes while it is read.
    """
    digest = xxhash.xxh3_128()
    with open_unchanged(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def gunzip(data: bytes, label: str, hint: str | None = None) -> bytes:
    """Return the content of gzip's bytes.

    Args:
        data: The compressed bytes.
        label: Their name in messages, such as the file.
        hint: Hint of the errors.

    Raises:
        WorkbenchError: If they are truncated or damaged, or if the content is larger than 2 GiB, which is found out in constant memory.
    """
    chunks: list[bytes] = []
    try:
        # Deflate packs at most 1,032 bytes into one: what may be large is counted before it is kept.
        for keep in (True,) if len(data) < _SURELY_SMALL else (False, True):
            total = 0
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
                while chunk := stream.read(1 << 20):
                    total += len(chunk)
                    if total > MAX_UNPACKED:
                        raise WorkbenchError(f"{label}: unpacks to more than {size(MAX_UNPACKED)}", hint)
                    if keep:
                        chunks.append(chunk)
    except EOFError:
        raise WorkbenchError(f"{label}: the file is truncated", hint) from None
    except (OSError, zlib.error) as error:
        raise WorkbenchError(f"{label}: cannot be read: {str(error) or type(error).__name__}", hint) from error
    return b"".join(chunks)


def read_json(path: Path, **needs: type | tuple[type, ...]) -> dict[str, Any] | None:
    """Read a JSON object from the workbench's cache and check that it has the required fields.

    Args:
        path: The file.
        needs: Required field -> its type or types.

    Returns:
        The object, or None if the file is missing, is damaged or lacks a required field. Callers then compute its content again.
    """
    cached = jsondoc.read_cached(path)
    return cached if cached is not None and all(isinstance(cached.get(key), kind) for key, kind in needs.items()) else None


def write_memo(path: Path, data: Mapping[str, object]) -> None:
    """Write a JSON object into the workbench's cache, with the digest by which `read_memo` notices other bytes of the same size."""
    write_json(path, {**data, _SUM: json_digest(json.loads(json_text(data)))})


def read_memo(path: Path, **needs: type | tuple[type, ...]) -> dict[str, Any] | None:
    """Read what `write_memo` wrote, as `read_json` does; None also if its digest is another. Earlier versions wrote none."""
    memo = read_json(path, **needs)
    stated = memo.pop(_SUM, None) if memo is not None else None
    return memo if stated is None or stated == json_digest(memo) else None


def json_text(data: Any, indent: int | None = None) -> str:
    """Return the text of a JSON file."""
    return json.dumps(data, indent=indent, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any, indent: int | None = None) -> None:
    """Write a JSON file atomically."""
    write_text(path, json_text(data, indent))


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add a file's name to operating system errors that have none, such as those of write()."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file or the entries of a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming_file(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not support it
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; if the block succeeds, the file there is flushed and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Remove what killed processes have left of the file. Other names of this form may be the user's; a folder is listed once a process.
    folder = str(path.parent)
    if folder not in _abandoned:
        left = _abandoned[folder] = {}
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if (named := UNFINISHED.fullmatch(entry.name)) and time.time() - entry.stat().st_mtime > _ABANDONED:
                    left.setdefault(named[1], []).append(entry.path)
    for file in _abandoned[folder].pop(path.name, ()):
        with contextlib.suppress(OSError):
            Path(file).unlink()
    # A process's number alone is not enough: other hosts that write here may have it too.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{int.from_bytes(os.urandom(4))}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and create its directory if necessary."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically and create its directory if necessary."""
    write_bytes(path, text.encode())


def check_new(out: Path) -> None:
    """Check that an output directory is new.

    Raises:
        WorkbenchError: If `out` exists and is not an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WorkbenchError(
            f"-o {out}: exists and is not an empty directory", "Choose a new directory. Existing files are never overwritten."
        )


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `out` if the block succeeds, and deleted if it fails."""
    check_new(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def scratch_beside(place: Path) -> Iterator[Path]:
    """Yield an empty folder on the file system of a place, in which its content is made before it is moved there; it is removed afterwards.

    Folders that killed processes have left are removed first. A folder is locked while it is in use; it gets its name when it is locked.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # file systems without locks
            held.enter_context(_locked(folder))
            folder = folder.rename(folder.with_name(SCRATCH + folder.name.removeprefix(".new-")))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder; BlockingIOError if another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def publish_once(partial: Path, target: Path) -> None:
    """Rename a finished directory to its final path, unless another process was first: others may read that one already."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def publish(partial: Path, target: Path) -> None:
    """Flush everything in a finished directory and rename it to its final path, replacing a directory that exists there."""
    for folder, _, files in os.walk(partial):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync(target.parent)

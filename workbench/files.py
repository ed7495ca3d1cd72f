"""Files: JSON, digests of content, and writes that happen whole or not at all.

Every error of the operating system that leaves here names its file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from workbench import jsondoc
from workbench.identity import unchanged


def digest_of(data: bytes) -> str:
    """XXH3-128 in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def json_digest(value: Any) -> str:
    """Digest of plain data: XXH3-128 of its canonical JSON, 32 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def bytes_digest(data: bytes) -> str:
    """Digest of bytes in memory: that of a file that holds them."""
    return xxhash.xxh3_128_hexdigest(data)


def file_digest(path: Path) -> str:
    """Digest of a file's bytes. Errors: the file changes while it is read."""
    digest = xxhash.xxh3_128()
    with unchanged(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(data, indent=indent, ensure_ascii=False) + "\n")


_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a file's name on errors of the operating system that carry none, as those of write() do."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has nothing to flush
            raise
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there is flushed and renamed to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
    """Write a file whole or not at all; its folder is made."""
    with whole(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all; its folder is made."""
    write_bytes(path, text.encode())


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder its final name, after everything in it has been flushed; what stood there is removed."""
    for folder, _, files in os.walk(partial):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync(target.parent)

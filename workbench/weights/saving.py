"""Files that exist whole or not at all: written under a temporary name, flushed to the disk, renamed.

Every error of the operating system that leaves here names its file.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

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


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; its folder is made."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:  # the library has no OSError, only the text of one
            if found := _OS_ERROR.search(str(error)):
                number = int(found[1])
                raise OSError(number, os.strerror(number), str(path)) from error
            raise


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder its final name, after everything in it has been flushed; what stood there is removed."""
    for folder, _, files in os.walk(partial):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync(target.parent)

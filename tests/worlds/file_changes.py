"""Ways in which programs change a file, and in which it is damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

OLD = "overwritten, old times"
WAYS = (OLD, OLD, OLD, "overwritten", "replaced", "replaced, old times", "cp -p", "cp -p")
BREAKING = ("truncated", "deleted")
DAMAGES = ("deleted", "cut", "emptied", "garbage", "{}", "[]", "same size", "same size", "same size")


def write(file: Path, content: bytes, way: str) -> None:
    """Give a file another content in one of the ways in which programs do that."""
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns) if file.exists() else None
    if way.startswith("replaced"):
        new = file.with_name("new")
        new.write_bytes(content)
        if times and way.endswith("old times"):
            os.utime(new, ns=times)
        new.rename(file)
        return
    if way == "cp -p":
        other = file.with_name("new")
        other.write_bytes(content)
        os.utime(other, (1e9, 1e9))
        shutil.copy2(other, file)
        other.unlink()
        return
    file.write_bytes(content)
    if times and way.endswith("old times"):
        os.utime(file, ns=times)


def whole(file: Path) -> bool:
    """Return whether a document is an object."""
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def damage(file: Path, how: str) -> None:
    """Damage a file; with "same size", its times too are the old ones, and a document has another digest in its middle if it has any."""
    raw = file.read_bytes()
    digests = [*re.finditer(rb"[0-9a-f]{16,}", raw)]
    half = digests[len(digests) // 2].start() if digests else len(raw) // 2
    if how == "deleted":
        file.unlink()
    elif how == "same size" and raw:
        write(file, raw[:half] + bytes([raw[half] ^ 1]) + raw[half + 1 :], OLD)
    else:
        file.write_bytes(
            {"cut": raw[: len(raw) // 2], "emptied": b"", "garbage": b"\xff" * (len(raw) + 1)}.get(how, how.encode())
        )

"""The compiled kernels: built once into the user's cache, checked before every load and rebuilt if damaged."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from workbench.files import sync
from workbench.project import user_caches

_SOURCE = Path(__file__).with_name("kernels.c")
_WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_FLAGS = ("-O3", "-march=native", *_WIDE, "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_SYMBOLS = (
    "wb_widen",
    "wb_difference",
    "wb_combine",
    "wb_dots",
    "wb_narrow",
    "wb_window",
    "wb_find",
    "wb_drop_sums",
    "wb_sparse",
    "wb_product",
)


@dataclass(frozen=True)
class Backend:
    """The implementation of the block loops in this process.

    Attributes:
        name: "c" or "torch".
        reason: The reason for using torch; None for C.
        asked: Whether the environment variable WORKBENCH_KERNELS requests torch.
        compiler: The compiler's command, if one was found.
        version: First line of the compiler's `--version`.
        file: The loaded library.
        removed: Damaged libraries that were removed.
        library: The loaded functions.
    """

    name: str
    reason: str | None = None
    asked: bool = False
    compiler: str | None = None
    version: str | None = None
    file: Path | None = None
    removed: tuple[Path, ...] = ()
    library: ctypes.CDLL | None = None

    def record(self) -> dict[str, Any]:
        """Return the fields for run.json."""
        fields = {"kernels": self.name, "compiler": self.compiler, "version": self.version, "reason": self.reason}
        return {key: value for key, value in fields.items() if value is not None}


@cache
def backend() -> Backend:
    """Load the library for this processor, source and compiler; build it first if it is missing or damaged."""
    if os.environ.get("WORKBENCH_KERNELS") == "torch":
        return Backend("torch", "the environment variable WORKBENCH_KERNELS requests it", asked=True)
    if not _SOURCE.is_file():
        return Backend("torch", f"{_SOURCE.name} is missing from the installation")
    text = os.environ.get("CC") or "cc"
    try:
        command = shlex.split(text)
    except ValueError as error:
        return Backend("torch", f"the environment variable CC is not a valid command ({error}): {text}")
    if not command or shutil.which(command[0]) is None:
        return Backend("torch", f"no C compiler: {command[0] if command else text} is not on the PATH")
    reason, removed = "", list[Path]()
    try:
        answer = subprocess.run([*command, "--version"], check=True, capture_output=True, timeout=60)  # noqa: S603 (the user's own compiler)
        version = next(iter(answer.stdout.decode(errors="replace").splitlines()), "")
    except (OSError, subprocess.SubprocessError) as error:
        return Backend("torch", f"{text} --version fails: {_message(error)}", compiler=text)
    key = xxhash.xxh3_64_hexdigest(_SOURCE.read_bytes() + repr((_FLAGS, command, answer.stdout, _processor())).encode())
    for place in user_caches():
        try:
            file, damaged = _cached(place, key)
            removed += damaged
            file = file or _build(place, key, command)
            library = _load(file)
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            reason = reason or _message(error)
            continue
        return Backend("c", None, False, text, version, file, tuple(removed), library)
    return Backend("torch", reason, False, text, version, None, tuple(removed))


def _cached(place: Path, key: str) -> tuple[Path | None, list[Path]]:
    """Return the library of a key whose bytes match the digest in its name, and the damaged libraries, which are removed.

    Every library is checked before it is loaded, because loading a truncated file kills the process with SIGBUS.
    """
    removed: list[Path] = []
    for file in sorted(place.glob(f"kernels-{key}-*.so")):
        if file.stem.rpartition("-")[2] == xxhash.xxh3_128_hexdigest(file.read_bytes()):
            return file, removed
        file.unlink(missing_ok=True)
        removed.append(file)
    return None, removed


def _build(place: Path, key: str, command: list[str]) -> Path:
    """Compile the library into a cache directory; its name contains the key and the digest of its bytes."""
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        built = Path(folder) / "kernels.so"
        call = [*command, *_FLAGS, str(_SOURCE), "-o", str(built)]
        subprocess.run(call, check=True, capture_output=True, timeout=120)  # noqa: S603
        file = place / f"kernels-{key}-{xxhash.xxh3_128_hexdigest(built.read_bytes())}.so"
        sync(built)
        built.replace(file)
        sync(place)
    return file


def _load(file: Path) -> ctypes.CDLL:
    """Load the library, and declare the result types of its functions."""
    library = ctypes.CDLL(str(file))
    for symbol in _SYMBOLS:
        getattr(library, symbol)
    library.wb_window.restype = library.wb_find.restype = ctypes.c_int64
    library.wb_dots.restype = None
    return library


def _message(error: Exception) -> str:
    """Return an error in one line, with the compiler's message if there is one."""
    output = getattr(error, "stderr", None) or b""
    lines = output.decode(errors="replace").strip().splitlines()
    line = next((line for line in lines if "error" in line), lines[0] if lines else "")
    return f"{line or error}"[:300]


def _processor() -> str:
    """Describe the processor, on which -march=native depends: machines may share a cache directory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", errors="replace").splitlines() if info.is_file() else []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())

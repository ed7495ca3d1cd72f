"""Messages and hints for errors of the operating system, and for libraries of extras that are not installed."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from workbench.ground.errors import WorkbenchError, refuses_memory, size
from workbench.ground.parts import parts

_EXTRAS = {
    "eval": {"lm_eval": "lm-eval", "datasets": "datasets"},
    "server": {"aiohttp": "aiohttp", "tenacity": "tenacity"},
    "cluster": {"ray": "ray"},
    "log": {"mlflow": "mlflow-skinny", "wandb": "wandb"},
}
"""Extra of pyproject.toml -> module -> its distribution, for what the core imports. Parts name theirs."""
_AGAIN = "then run the same command again: it resumes."
_WRITABLE = "Name a writable place: --runs-dir DIR for runs, -o DIR for a result, WORKBENCH_CACHE=DIR for the project's cache."


def explained(error: OSError) -> WorkbenchError:
    """Return an operating system's error as a message that names the file, with a hint that fixes it."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list) and error.args[0]:
        _, target, reason = error.args[0][0][:3]  # copytree lists (source, target, reason) of each file
        return WorkbenchError(f"{target}: cannot write the file: {reason}", f"Fix the cause, {_AGAIN}")
    if error.errno is None:
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        return WorkbenchError(text, "Set WORKBENCH_DEBUG=1 to see the traceback.")
    name = error.filename2 or error.filename
    path = None if name is None else Path(os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name))
    where = "a file" if path is None else str(path)
    message, hint = _said(error, path)
    return WorkbenchError(f"{where}: {message}", hint)


def short_of_memory(error: BaseException) -> WorkbenchError | None:
    """Return the error for memory or threads that the system refuses; None if `error` has another cause."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, RuntimeError) and "can't start new thread" in text:
            return WorkbenchError(
                "the system refuses to start another thread",
                "Raise the limits of memory and processes (ulimit -v unlimited; ulimit -u unlimited), or set OMP_NUM_THREADS=1.",
            )
        if refuses_memory(cause) and type(cause).__name__ != "OutOfMemoryError":  # of a device, which has a message of its own
            return WorkbenchError(
                "the system refuses more memory to this process",
                "Raise its limit (ulimit -v unlimited), end other programs, or use a machine with more memory: `workbench plan` says "
                "how much a run needs. The same command resumes what was interrupted.",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def missing_extra(error: BaseException, command: str) -> WorkbenchError | None:
    """Return the error for a library that belongs to an extra and is not installed; None if `error` has another cause.

    Args:
        error: An ImportError, or an error that was raised from one.
        command: The command that needs the library, such as "workbench eval".
    """
    cause: BaseException | None = error
    while cause is not None:
        module = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
        for extra, modules in extras().items():
            if module in modules and not _is_installed(module):
                missing = [name for other, name in modules.items() if not _is_installed(other)]
                listed = f"{' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
                return WorkbenchError(f"`{command}` needs {listed}: pip install 'brick-workbench[{extra}]'")
        cause = cause.__cause__
    return None


def extras() -> dict[str, Mapping[str, str]]:
    """Return extra of pyproject.toml -> module -> its distribution."""
    return _EXTRAS | {name: modules for part in parts().values() for name, modules in part.extras.items()}


def of_foreign(error: WorkbenchError, words: Sequence[str]) -> WorkbenchError | None:
    """Return an error about a thing on the command line that no command takes as it is, with the hint of `open`; None for other errors."""
    from workbench.ground.foreign_names import retyped
    from workbench.ground.recognize import look

    said = f"{error.message} {error.hint}"  # many readers know it; others look for something else first, such as a run
    with suppress(OSError, RuntimeError, ValueError):  # of a name that no path can have
        for name in (word.rpartition("=")[2] for word in words):
            path = Path(name)
            if not path.name or path.name not in error.message:
                continue
            thing, home = look(path), path.expanduser()
            may_be_read = path.is_file() and thing is not None and thing.kind in ("array", "pickle")  # by the command
            if thing and thing.problem and (thing.commands or [thing.problem])[0] not in said and not may_be_read:
                return error.reworded(error.message, f"{thing.name} is {thing.says}. {thing.hint}")
            meant = str(home) if home != path and home.exists() else retyped(name)
            if meant and meant not in said.replace(name, "").replace(str(path), ""):
                return error.reworded(error.message, f"Write {meant}.")
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def command_of(arguments: Sequence[str], groups: Sequence[str]) -> str:
    """Return the command of a command line, for messages: "workbench eval", "workbench brick ls".

    Args:
        arguments: The arguments after the program.
        groups: Commands that have subcommands.
    """
    words = [word for word in arguments if not word.startswith("-")]
    return " ".join(["workbench", *words[: 2 if words[:1] and words[0] in groups else 1]])


def while_printing(error: OSError) -> bool:
    """Return whether an error was raised while printing: command output, help texts or the last flush."""
    places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    printers = ("/workbench/console/output.py", "/click/utils.py", "/typer/core.py")
    return len(places) == 1 or any(place.replace(os.sep, "/").endswith(printers) for place in places[1:])


def _said(error: OSError, path: Path | None) -> tuple[str, str]:
    number, reason = error.errno, error.strerror or os.strerror(error.errno or 0)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return _full(number, path)
    if number == errno.EROFS:
        return "the file system is read-only", _WRITABLE
    if number in (errno.EACCES, errno.EPERM):
        return "permission denied", f"Change the owner or the permissions of the file or of its folder. {_WRITABLE}"
    if number in (errno.ENOTDIR, errno.EEXIST):
        file = next((p for p in (path, *path.parents) if p.is_file()), path) if path else None
        return f"expected a folder, but {file or 'a part of the path'} is a file", f"Move the file away, {_AGAIN}"
    if number == errno.EISDIR:
        return "expected a file, found a folder", f"Move the folder away, {_AGAIN}"
    if number == errno.ENAMETOOLONG:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0) if path else 0
        return (
            f"the name is too long ({longest} bytes in its longest part; most file systems allow 255)",
            "Choose a shorter name.",
        )
    if number == errno.EFBIG:
        return (
            "the file is larger than this process or file system allows",
            f"Raise the limit (ulimit -f unlimited), or write smaller files (output: {{shard_size: 1GB}}), {_AGAIN}",
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return "too many open files", f"Raise the limit (ulimit -n 65536), {_AGAIN}"
    if number == errno.ENOENT:
        return (
            "no such file or folder",
            "It may have been moved or removed while the command ran. Put it back, or name another path.",
        )
    if number == errno.EIO:
        return "the disk reports an input/output error", f"Check the disk (dmesg), {_AGAIN}"
    return reason[:1].lower() + reason[1:], f"Fix the cause, {_AGAIN}"


def _full(number: int, path: Path | None) -> tuple[str, str]:
    existing = next((p for p in (path, *path.parents) if p.exists()), None) if path else None
    free = f" ({size(shutil.disk_usage(existing).free)} free)" if existing else ""
    what = "the disk quota is used up" if number == errno.EDQUOT else f"no space is left on the disk{free}"
    return what, f"Free space (`workbench runs ls` lists runs to remove, `workbench doctor` lists caches), {_AGAIN}"

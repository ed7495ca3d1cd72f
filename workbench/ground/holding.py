"""Locks that one process holds at a time, with a note of who holds them: process, host and time.

The lock is flock's, so that it ends with its process, however that ends. The note is for messages and for the viewer. Between hosts, a lock holds
where the file system passes flock on to its server.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json, write_json


class BusyError(WorkbenchError):
    """Another process holds the lock."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        pid: Its number on its machine.
        since: When it took the lock, in seconds of Unix time.
        host: Name of its host; empty in notes of earlier versions.
        machine: Boot of the host, and namespace of process numbers: where `pid` means this process.
        started: When the process started, in ticks since the boot; empty where the system does not tell.
    """

    pid: int
    since: float
    host: str = ""
    machine: str = ""
    started: str = ""

    @classmethod
    def of(cls, lock: Path) -> Holder | None:
        """Return the holder that is noted beside a lock file, or None."""
        note = read_json(_note(lock), pid=int, since=(int, float)) or {}
        return (
            cls(note["pid"], note["since"], *(str(note.get(key, "")) for key in ("host", "machine", "started"))) if note else None
        )

    @property
    def gone(self) -> bool:
        """True if the process has surely ended. A process of another host, boot or container is never looked for by its number here."""
        if (self.host, self.machine) != _here():
            return False
        started = _started(self.pid)
        return started is None or ("" not in (started, self.started) and started != self.started)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"pid {self.pid} on {self.host or 'an unknown host'} since {since}"


@contextmanager
def held(lock: Path, place: object, does: str, hint: str, wait: float | None = 0, *, once: bool = False) -> Iterator[None]:
    """Hold a lock file for a `with` block, and note beside it who does.

    Args:
        lock: The file, whose name ends in "lock".
        place: What is locked, as messages name it.
        does: What the other process does, such as "writes this run".
        hint: Hint of the error.
        wait: Seconds to wait for another process; None: until it ends.
        once: Remove the file when the block has succeeded: whoever still waits for it then finds its work done.

    Raises:
        BusyError: If another process still holds the lock; the message names it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    file, free, done = FileLock(str(lock)), False, False
    with suppress(Timeout):
        file.acquire(timeout=-1 if wait is None else wait, poll_interval=0.1)
        free = True
    if not free:
        del file  # before the message: the lock's finalizer swallows the Ctrl-C that may follow on it
        holder = Holder.of(lock)  # None in the instant before the other process notes it
        raise BusyError(f"{place}: another process{f' ({holder})' if holder else ''} {does}", hint)
    try:
        host, machine = _here()
        write_json(_note(lock), asdict(Holder(os.getpid(), time.time(), host, machine, _started(os.getpid()) or "")))
        yield
        done = once
    finally:
        _note(lock).unlink(missing_ok=True)
        if done:
            lock.unlink(missing_ok=True)
        file.release()


def _note(lock: Path) -> Path:
    return lock.with_name(f"{lock.name.removesuffix('lock')}holder")


def _here() -> tuple[str, str]:
    """Return the name of this host, and its boot with the namespace of process numbers, which containers of one host do not share."""
    known = []
    with suppress(OSError):  # systems without /proc
        known = [Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip(), str(Path("/proc/self/ns/pid").readlink())]
    return socket.gethostname(), " ".join(known)


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot, "" if the system does not tell, or None if it has ended."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
    return ""

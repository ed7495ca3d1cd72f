"""Faults in the calls of a command to the operating system: the n-th write, rename, allocation … fails, or the process ends there.

A server process imports the libraries once and forks for each call, with `tests/faults/shim.c` loaded into it. So a case takes the time of the
command alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import gc
import importlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from worlds.fault_commands import Command
from worlds.places import TESTS

ERRORS = {
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "sync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.EACCES, errno.ENOSPC),
    "link": (errno.EMLINK, errno.EACCES),
    "create": (errno.ENOSPC, errno.EACCES, errno.EMFILE),
    "truncate": (errno.ENOSPC, errno.EIO),
    "remove": (errno.EACCES, errno.EIO),
    "map": (errno.ENOMEM,),
    "allocate": (errno.ENOMEM,),
    "connect": (errno.ECONNREFUSED, errno.ENETUNREACH),
    "send": (errno.ECONNRESET,),
    "receive": (errno.ECONNRESET,),
    "execute": (errno.EAGAIN, errno.EACCES),
}
"""Kind of call -> the errors that it has in turn."""
KINDS = tuple(ERRORS)
_LIMIT = 60.0
"""Seconds after which a command hangs."""
MODES = ("count", "fail", "kill", "short", "torn")


class _State(ctypes.Structure):
    """The page that the shim reads, see `shim.c`."""

    _fields_ = [
        ("armed", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("mode", ctypes.c_int),
        ("error", ctypes.c_int),
        ("n", ctypes.c_long),
        ("counts", ctypes.c_long * len(KINDS)),
        ("fired", ctypes.c_long),
        ("root", ctypes.c_char * 4096),
    ]


@dataclass(frozen=True)
class Fault:
    """The n-th call of a kind fails, ends the process, or writes half of its bytes.

    Attributes:
        kind: One of `KINDS`.
        n: Which call, from 1.
        mode: "fail", "kill", "short" (half of the bytes are written, as the system may do), or "torn" (half, then the process ends).
    """

    kind: str = "write"
    n: int = 0
    mode: str = "count"

    @property
    def error(self) -> int:
        """The error of the call."""
        return ERRORS[self.kind][self.n % len(ERRORS[self.kind])]

    def __str__(self) -> str:
        return f"{self.mode} {self.kind} {self.n}" + (f" ({errno.errorcode[self.error]})" if self.mode == "fail" else "")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        codes: Exit status of each process; negative for a signal, None if it took too long.
        fired: True if the fault happened.
        counts: Kind -> number of calls.
        out: What it printed.
        err: What it printed as messages.
        seconds: Its time on the processor.
    """

    codes: list[int | None]
    fired: bool
    counts: dict[str, int]
    out: str
    err: str
    seconds: float


class Faults:
    """The server of one test session, which runs commands with faults.

    Args:
        folder: An empty folder for the compiled shim and the state.
    """

    def __init__(self, folder: Path) -> None:
        shim, state = folder / "shim.so", folder / "state"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", shim, TESTS / "faults" / "shim.c", "-ldl"], check=True)
        state.write_bytes(bytes(ctypes.sizeof(_State)))
        environment = {
            **os.environ,
            "LD_PRELOAD": str(shim),
            "FAULTS": str(state),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", "from worlds.faults import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.seconds = 0.0

    def call(self, command: Command, folder: Path, fault: Fault | None = None, hub: str | None = None) -> Outcome:
        """Run a command in a project folder, below which calls count.

        Args:
            command: The command.
            folder: The folder.
            fault: What goes wrong, in one of the command's processes.
            hub: Address of a hub.
        """
        fault = fault or Fault()
        request = {"arguments": command.line.split(), "processes": command.processes, "places": command.places}
        request |= {"folder": str(folder), "hub": hub, "error": fault.error}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({**request, **vars(fault)}) + "\n")
        self.server.stdin.flush()
        done = Outcome(**json.loads(self.server.stdout.readline()))
        self.seconds += done.seconds
        return done

    def close(self) -> None:
        """End the server."""
        self.server.kill()
        self.server.wait()


def serve() -> NoReturn:
    """Answer requests from standard input, each in a forked process."""
    import torch

    from workbench.cli.app import silence
    from workbench.cli.index import COMMANDS, command
    from workbench.ground import identity

    silence()
    for name in COMMANDS:
        if " " not in name:
            command(name)
    torch.set_num_threads(1)
    identity._TICKS_NS = int(2e9 * time.clock_getres(5))  # as in conftest.py
    with open(os.environ["FAULTS"], "r+b") as file:
        page = mmap.mmap(file.fileno(), ctypes.sizeof(_State))
    state = _State.from_buffer(page)
    for line in sys.stdin:
        gc.freeze()  # otherwise a collection in the forked process copies every page
        sys.stdout.write(json.dumps(_one(state, json.loads(line))) + "\n")
        sys.stdout.flush()
    os._exit(0)


def _one(state: _State, request: dict[str, Any]) -> dict[str, Any]:
    """Run one command with a fault, and return the fields of its outcome."""
    ctypes.memset(ctypes.addressof(state), 0, ctypes.sizeof(state))
    state.kind, state.mode = KINDS.index(request["kind"]), MODES.index(request["mode"])
    state.n, state.error, state.root = request["n"], request["error"], request["folder"].encode()
    printed = Path(tempfile.mkdtemp(prefix="faults-"))
    children = []
    for _ in range(request["processes"]):
        children.append(os.fork())
        if children[-1] == 0:
            _command(state, request, printed)
    ended = [_wait(child) for child in children]
    state.armed = 0
    out, err = ((printed / name).read_text("utf-8", errors="replace") for name in ("out", "err"))
    if request["mode"] == "count" and (printed / "modules").is_file():
        _import((printed / "modules").read_text("utf-8").split())
    shutil.rmtree(printed)
    return {
        "codes": [code for code, _ in ended],
        "fired": bool(state.fired),
        "counts": dict(zip(KINDS, list(state.counts), strict=True)),
        "out": out,
        "err": err,
        "seconds": sum(seconds for _, seconds in ended),
    }


def _wait(child: int, limit: float = _LIMIT) -> tuple[int | None, float]:
    """Wait for a process, and end it and those that it has started. Returns its exit status, None if it took too long, and its time."""
    deadline, code, seconds = time.monotonic() + limit, None, limit
    while code is None and time.monotonic() < deadline:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        else:
            time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code, seconds


def _import(names: list[str]) -> None:
    """Import what a command has imported, so that the next processes need not."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _command(state: _State, request: dict[str, Any], printed: Path) -> NoReturn:
    """Run the command in the forked process and end it, as an interpreter would."""
    code = 70
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
        os.chdir(request["folder"])
        os.environ |= {name: f"{request['folder']}/{value}" for name, value in request["places"].items()}
        tempfile.tempdir = f"{request['folder']}/.tmp"
        Path(tempfile.tempdir).mkdir(exist_ok=True)
        if request["hub"]:
            _use_hub(request["hub"], Path(request["folder"]))
        sys.argv = ["workbench", *request["arguments"]]
        from workbench.cli.__main__ import main

        faulthandler.dump_traceback_later(_LIMIT - 2, file=2)
        state.armed = 1
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        state.armed = 0
        (printed / "modules").write_text(" ".join(sys.modules), "utf-8")
    except BaseException:  # noqa: BLE001 - an interpreter would print it, too
        state.armed = 0
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _use_hub(url: str, folder: Path) -> None:
    """Let huggingface_hub speak with a server on this machine; it has read its settings when it was imported."""
    from huggingface_hub import constants

    from worlds.hub_server import TOKEN

    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = url, False, True
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(folder / ".hub")
    os.environ["HF_TOKEN"] = TOKEN

"""Commands in processes of their own: the libraries that they import, and what they do where libraries are missing."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

_PROGRAM = """
import json, os, sys, traceback
from importlib.machinery import PathFinder

commands, watched, missing = json.loads(sys.argv[1])
folder = sys.argv[2]
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name in missing else find_spec(name, *rest)
from workbench.cli.app import main

ended = []
for number, arguments in enumerate(commands):
    sys.argv[1:] = arguments
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    ended.append((code, [module for module in watched if module in sys.modules]))
with open(f"{folder}/ended", "w") as file:
    json.dump(ended, file)
"""

Ended = tuple[subprocess.CompletedProcess[str], set[str]]
"""A finished command, and the watched modules that its process has imported by then."""


def in_one_process(
    commands: Iterable[Sequence[str]],
    cwd: Path,
    watched: Iterable[str] = (),
    missing: Collection[str] = (),
    environment: dict[str, str] | None = None,
    preexec: Callable[[], None] | None = None,
) -> list[Ended]:
    """Run commands one after another in one new process, which costs the start-up of one.

    Args:
        commands: The arguments after `workbench` of each command.
        cwd: Working directory.
        watched: Modules to look for when a command has ended.
        missing: Modules that cannot be imported, as if they were not installed.
        environment: Environment variables; None: those of this process.
        preexec: Called in the new process before Python starts.
    """
    commands = [list(arguments) for arguments in commands]
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps([commands, list(watched), list(missing)])
        program = [sys.executable, "-c", _PROGRAM, given, folder]
        done = subprocess.run(program, cwd=cwd, env=environment, preexec_fn=preexec, capture_output=True, text=True, check=False)
        place = Path(folder)
        said = "".join(file.read_text("utf-8") for file in sorted(place.glob("*.std*")))
        assert (place / "ended").exists(), done.stderr + said
        return [
            (
                subprocess.CompletedProcess(
                    arguments,
                    code,
                    (place / f"{number}.stdout").read_text("utf-8"),
                    (place / f"{number}.stderr").read_text("utf-8"),
                ),
                set(imported),
            )
            for number, (arguments, (code, imported)) in enumerate(
                zip(commands, json.loads((place / "ended").read_text("utf-8")), strict=True)
            )
        ]


def workbench(*arguments: str, cwd: Path, watched: Iterable[str] = (), missing: Collection[str] = ()) -> Ended:
    """Run one command in a new process."""
    return in_one_process([arguments], cwd, watched, missing)[0]

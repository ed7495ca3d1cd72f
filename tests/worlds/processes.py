"""Commands in processes of their own: the libraries that they import, and what they do where libraries are missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

_PROGRAM = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name in {missing!r} else find_spec(name, *rest)
sys.argv[1:] = {arguments!r}
from workbench.cli import main
try:
    main()
finally:
    print("imported:", *[m for m in {watched!r} if m in sys.modules], file=sys.stderr)
"""


def workbench(
    *arguments: str, cwd: Path, watched: Iterable[str] = (), missing: Collection[str] = ()
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command in a new process.

    Args:
        arguments: The arguments after `workbench`.
        cwd: Working directory.
        watched: Modules to look for when the command has ended.
        missing: Modules that cannot be imported, as if they were not installed.

    Returns:
        The finished process, without the line about modules, and the watched modules that it has imported.
    """
    code = _PROGRAM.format(arguments=list(arguments), watched=tuple(watched), missing=tuple(missing))
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    *lines, last = done.stderr.splitlines()
    assert last.startswith("imported:"), done.stderr
    done.stderr = "\n".join(lines)
    return done, set(last.split()[1:])

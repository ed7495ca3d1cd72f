"""Commands in forks of one process that has imported the package, for tests that read what a process of its own used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

SERVER = """
import json, os, sys

import torch

import workbench.recipe.methods, workbench.resolve.resolve, workbench.run.execute
from workbench.cli import main

workbench.recipe.methods.methods()
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(request["cwd"])
        os.dup2(os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        sys.argv, code = ["workbench", *request["args"]], 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkedCommands:
    """The command line in a process of its own for each call, without the seconds that imports take. A context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def document(self, *args: str, cwd: Path) -> Any:
        """Run a command and return its JSON document."""
        out = cwd / "stdout.json"
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"args": [*args, "--json"], "cwd": str(cwd), "out": str(out)}) + "\n")
        self._process.stdin.flush()
        code = self._process.stdout.readline().strip()
        assert code == "0", f"{' '.join(args)}: exit code {code or 'unknown'}"
        return json.loads(out.read_text("utf-8"))

    def __enter__(self) -> ForkedCommands:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

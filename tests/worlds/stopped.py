"""A run in another process that stops in the middle of its checkpoint until it is told to go on, or killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worlds.project import Project

CHILD = """
import sys
import torch
import workbench.weights.writer as writer
from workbench.run.execute import execute
from workbench.run.device import Work
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from pathlib import Path

real, written = writer._write_tensor, 0
def stopping(*args):
    global written
    written += 1
    if written == 9:
        print("stopped", flush=True)
        sys.stdin.readline()
    return real(*args)
writer._write_tensor = stopping
torch.set_num_threads(1)
execute(resolve(load_recipe(sys.argv[1])), Path(sys.argv[2]), Work(torch.device("cpu"), 1))
"""


@contextmanager
def stopped_run(project: Project, recipe: Path) -> Iterator[subprocess.Popen[str]]:
    """The process of a run that has written eight tensors and waits for a line on its standard input; killed at the end."""
    command = [sys.executable, "-c", CHILD, str(recipe), str(project.path / "runs")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "stopped\n", "the run ended before its ninth tensor"
        yield child
    finally:
        child.kill()
        child.communicate()

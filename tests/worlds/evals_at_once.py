"""Evaluations in processes of their own that write down which request they answer, and stop in the middle where they are told to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from workbench.scores import files

log, stop, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
add, answers = files.Journal.add, 0

def noting(journal, found):
    global answers
    add(journal, found)
    with open(log, "a") as file:
        file.writelines(json.dumps([*journal.path.parts[-3:], number]) + "\\n" for number in found)
    before, answers = answers, answers + len(found)
    if before < stop <= answers:
        print("stopped", file=sys.stderr, flush=True)
        sys.stdin.readline()

files.Journal.add = noting
sys.argv[1:] = arguments
from workbench.cli.app import main
main()
"""


def evaluation(place: Path, *arguments: str, stop: int = 0) -> subprocess.Popen[str]:
    """Start `workbench eval`; `stop` is the number of answers after which it waits for a line on its standard input, 0: never."""
    command = [sys.executable, "-c", PROGRAM, str(place / "answered"), str(stop), "eval", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=place, text=True, **pipes)


def until(process: subprocess.Popen[str], text: str) -> str:
    """Return the line of standard error that holds a text."""
    assert process.stderr is not None
    said = []
    while not said or text not in said[-1]:
        said.append(process.stderr.readline())
        assert said[-1], f"the process ended: {said}"
    return said[-1]


def answered(place: Path) -> list[tuple[str, str, str, int]]:
    """Return (suite, configuration, task, request) of every answer that any process has computed."""
    file = place / "answered"
    return [tuple(json.loads(line)) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def stored_rows(place: Path) -> dict[str, tuple[str, str]]:
    """Return the digests of the rows and the items of every scores document."""
    documents = {file: json.loads(file.read_text("utf-8")) for file in (place / "runs" / "scores").glob("*/*.json")}
    return {f"{f.parent.name}/{f.name}": (d["rows"], d["items"]) for f, d in documents.items() if f.name != "plan.json"}

"""Writing of results files, which name the machine, the command and the commit."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """Return the command line of a benchmark: its docstring as help, and `--out` with its results file.

    Args:
        description: The module's docstring.
        name: The results file's stem.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{name}.json", help="the results file")
    return parser


def write_results(path: Path, document: dict[str, Any]) -> None:
    """Write a results file that names machine, command, commit and day."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    script = Path(sys.argv[0]).resolve()
    arguments = sys.argv[1:]
    for flag in {"--encoder", "--folder", "--log", "--out"} & set(arguments):  # places of this machine, which decide no number
        del arguments[arguments.index(flag) : arguments.index(flag) + 2]
    words = [str(script.relative_to(here.parent)) if script.is_relative_to(here.parent) else script.name, *arguments]
    document = {
        "machine": machine(),
        "command": "python " + shlex.join(words),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        **document,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def keep_head(path: Path, before: dict[str, Any], rows: list[str]) -> None:
    """Let a results file name the measurement before, and the new one as a later measurement of some rows.

    Args:
        path: The file as `write_results` wrote it.
        before: Its content before.
        rows: Names of the rows that are measured again.
    """
    document = json.loads(path.read_text("utf-8"))
    heads = ("machine", "command", "commit", "date")
    kept = [one for one in before.get("later", []) if not set(one["rows"]) <= set(rows)]
    later = [*kept, {**{key: document[key] for key in heads}, "rows": rows}]
    document = {**document, **{key: before[key] for key in heads}, "later": later}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def machine() -> str:
    """Return the processor, the number of cores and the system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"

"""Measure which tests reach which line, and run tests in a copy of the checkout with one file changed."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from mutation import Mutant

PROJECT = Path(__file__).resolve().parents[1]


@dataclass
class Reach:
    """Tell which tests of a room reach which line. One mutant is asked `longest` seconds of them at most, by their time without it."""

    longest: float
    lines: dict[str, dict[int, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    seconds: dict[str, float] = field(default_factory=dict)
    libraries: dict[str, None] = field(default_factory=dict)

    def add(self, found: dict[str, Any], now: dict[str, str]) -> None:
        """Add what one folder's tests reach; lines of a file that has changed since are those with the same text."""
        self.seconds |= found["seconds"]
        self.libraries |= dict.fromkeys(found["libraries"])
        for path, lines in found["reach"].items():
            moved = moved_lines(found["texts"][path], now.get(path, ""))
            for line, tests in lines.items():
                if int(line) in moved:
                    self.lines[path][moved[int(line)]].update(tests)

    def of_line(self, mutant: Mutant) -> set[str]:
        """Tests that reach a mutant's line; of a line that runs on import, those that reach its file."""
        lines = self.lines[mutant.path]
        first, last = mutant.lines
        found = {test for line in range(first, last + 1) for test in lines.get(line, ())}
        return found or (self.of_file(mutant) if mutant.once else set())

    def of_file(self, mutant: Mutant) -> set[str]:
        """Tests that reach any line of a mutant's file; all tests where none does, as with a file of classes."""
        found = {test for tests in self.lines[mutant.path].values() for test in tests}
        return found or (set(self.seconds) if mutant.once else set())

    def ordered(self, tests: Iterable[str]) -> list[str]:
        """The quickest tests first, one of each function before another of its cases, as many as `longest` allows."""
        cases: Counter[str] = Counter()
        turns: list[tuple[int, float, str]] = []
        for seconds, test in sorted((self.seconds[test], test) for test in tests):
            function = test.partition("[")[0]
            turns.append((cases[function], seconds, test))
            cases[function] += 1
        chosen: list[str] = []
        total = 0.0
        for _, seconds, test in sorted(turns):
            if not chosen or total + seconds <= self.longest:
                chosen.append(test)
                total += seconds
        return chosen


def moved_lines(before: str, now: str) -> dict[int, int]:
    """Line of a text -> line of a later text, for lines that are the same."""
    if before == now:
        return {line: line for line in range(1, len(now.splitlines()) + 1)}
    blocks = difflib.SequenceMatcher(None, before.splitlines(), now.splitlines(), autojunk=False).get_matching_blocks()
    return {a + i + 1: b + i + 1 for a, b, size in blocks for i in range(size)}


class Worker:
    """A copy of the checkout, and the process that runs tests in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            if (PROJECT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / name, folder / name, follow_symlinks=False)
        self.process: subprocess.Popen[str] | None = None

    def start(self, libraries: Iterable[str] = ()) -> None:
        """Start the process anew, with libraries to import once."""
        self.stop()
        paths = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(PROJECT / "benchmarks" / "mutant_server.py")]
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdin is not None
        print(json.dumps(list(libraries)), file=self.process.stdin, flush=True)

    def stop(self) -> None:
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def ask(self, **job: Any) -> dict[str, Any]:
        """Run tests and return the answer."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def judge(self, mutant: Mutant, reach: Reach) -> dict[str, Any]:
        """Return what becomes of a mutant, and the test that killed it or the tests that did not."""
        file = self.folder / mutant.path
        original = file.read_text("utf-8")
        bytecode = Path(cache_from_source(str(file)))
        asked: list[str] = []
        found: dict[str, Any] = {"status": "not reached"}
        try:
            file.write_text(mutant.source, "utf-8")
            bytecode.unlink(missing_ok=True)  # it is believed where the size and the second of the file are the same
            first = reach.of_line(mutant)
            for tests in (first, reach.of_file(mutant)):  # a line that only processes of tests reach is in the file's tests
                if chosen := [test for test in reach.ordered(tests) if test not in asked]:
                    asked += chosen
                    limit = 3 * sum(reach.seconds[test] for test in chosen) + 20
                    answer = self.ask(tests=chosen, limit=limit)
                    found = {"status": {"passed": "survived", "failed": "killed"}.get(answer["status"], answer["status"])}
                    if found["status"] != "survived":
                        failed = re.search(r"(?:FAILED|ERROR) (\S+)", answer["output"])
                        found["by"] = failed[1] if failed else answer["output"][-300:]
                        break
        finally:
            file.write_text(original, "utf-8")
            bytecode.unlink(missing_ok=True)
        if found["status"] == "survived" and not first:
            found["status"] = "not reached"
        return {**found, "asked": len(asked)}

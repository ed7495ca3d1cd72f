"""Mutation score of a folder: small mistakes are made in its files one at a time, and tests that reach the line run until one fails.

    python benchmarks/mutants.py --minutes 10
    python benchmarks/mutants.py --room scores --since main
    python benchmarks/mutants.py --room resolve --again      the survivors of the results file once more

The changes are mutmut's, and three of our own (`mutation.py`). mutmut's runner makes none in decorated functions (one of seven here), in fields of
classes or at the top of a module, draws no sample, and forks with the caches of an earlier run; cosmic-ray starts a process a mutant, which is 5 s
of imports. So `mutant_server.py` forks a child a mutant from a process that has imported the libraries, and nothing of the package.

Not changed: docstrings, annotations, what errors and logs say, `__repr__`,
`assert`, and guards such as `strict=True`. A seeded sample takes each statement at most once before it takes one twice. A mutant is *killed*
when a test fails or takes three times as long; it has *survived* the tests that reach its line, and then those that reach its file. A line
that no test reaches counts as survived. Known equivalents, in `equivalent_mutants.yaml` with the reason, are left out of the score.
Which tests reach which line is measured once and kept in .workbench/mutants. Slow tests do not run.
Results go to benchmarks/results/mutants.json.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import yaml
from mutation import Change, Mutant, changes
from record import keep_head, parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
KEPT = PROJECT / ".workbench" / "mutants"
EQUIVALENT = PROJECT / "benchmarks" / "equivalent_mutants.yaml"
# A room and the folders and files of tests that are asked: another folder, where its subject is what the room does. They are measured once, which
# takes as long as they do, twice over; `run` serves every kind of step, and so asks most of the tests.
ROOMS = {
    "merge": "merge",
    "weights": "weights merge adapters",
    "adapters": "adapters run",
    "edit/closed_form": "edit/test_edit_solver.py edit/test_edit_many.py edit/test_edit_sinks.py edit/test_edit_steps.py",
    "scores": "scores compare",
    "compare": "compare scores",
    "identity.py": "resolve run weights",
    "resolve": "resolve run recipe adapters upkeep/test_rebase.py bricks/test_neuron_bricks.py bricks/test_origin.py grow/test_stack_sources.py",
    "run": "run resolve recipe adapters edit grow fuse route train upkeep",
    "route": "route run/test_routed.py run/test_routed_merges.py",
}


@dataclass
class Reach:
    """Which tests of a room reach which line. One mutant is asked `longest` seconds of them at most, by their time without it."""

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
        """The quickest tests first, as many as `longest` allows."""
        chosen: list[str] = []
        total = 0.0
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            total += self.seconds[test]
            if chosen and total > self.longest:
                break
            chosen.append(test)
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
            for tests in (first, reach.of_file(mutant)) if first else ():
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
        return {**found, "asked": len(asked)}


def sources() -> dict[str, str]:
    """Path within the checkout -> text, of every file of the rooms."""
    found = {}
    for room in ROOMS:
        place = PROJECT / "workbench" / room
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found[str(path.relative_to(PROJECT))] = path.read_text("utf-8")
    return found


def measured(room: str, worker: Worker, longest: float) -> Reach:
    """Return what the tests of a room reach; folders whose tests are as they were are not run again."""
    reach, now = Reach(longest), sources()
    for place in ROOMS[room].split():
        path = PROJECT / "tests" / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
        kept = KEPT / f"{place.replace('/', '-')}-{digest}.json"
        if not kept.is_file():
            print(f"{room}: measuring which lines tests/{place} reaches", flush=True)
            worker.start()
            part = kept.with_suffix(".part")
            KEPT.mkdir(parents=True, exist_ok=True)
            job = {"measure": str(part), "rooms": [f"workbench/{room}" for room in ROOMS]}
            answer = worker.ask(tests=[f"tests/{place}"], limit=1800, **job)
            if not part.is_file():
                sys.exit(f"the tests of tests/{place} did not end: {answer}")
            found = {**json.loads(part.read_text("utf-8")), "texts": now}
            if found["failed"]:
                print(f"left out, since they fail without a mutant: {' '.join(found['failed'])}", flush=True)
            kept.write_text(json.dumps(found), "utf-8")
            part.unlink()
        reach.add(json.loads(kept.read_text("utf-8")), now)
    return reach


def drawn(room: str, seed: int, since: str | None) -> list[Change]:
    """Return every possible change of a room in a seeded order that takes each statement once before it takes one twice."""
    place = PROJECT / "workbench" / room
    found: list[Change] = []
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        lines = changed_lines(path, since) if since else None
        name = str(path.relative_to(PROJECT))
        found += [one for one in changes(path, name) if lines is None or lines & set(range(one.lines[0], one.lines[1] + 1))]
    random.Random(seed).shuffle(found)
    seen: Counter[tuple[str, tuple[int, int]]] = Counter()
    turns = []
    for one in found:
        turns.append(seen[one.path, one.lines])
        seen[one.path, one.lines] += 1
    return [one for _, one in sorted(zip(turns, found, strict=True), key=lambda pair: pair[0])]


def changed_lines(path: Path, since: str) -> set[int]:
    """Return the lines of a file that differ from those of a commit."""
    command = ["git", "diff", "--unified=0", since, "--", str(path)]
    text = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    hunks = re.findall(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", text, re.MULTILINE)
    return {int(start) + i for start, count in hunks for i in range(int(count or 1))}


def wilson(killed: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    z, n = 1.959964, max(total, 1)
    share = killed / n
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@dataclass
class Trial:
    """The mutants of one room that are tried, and what became of them."""

    room: str
    reach: Reach
    queue: list[Change]
    end: float
    most: int
    only: set[tuple[str, str, str]] | None
    known: set[tuple[str, str, str]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    equivalent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, worker: Worker) -> None:
        """Judge mutants until the time or the sample is at its end."""
        worker.start(self.reach.libraries)
        while time.monotonic() < self.end:
            with self.lock:
                if not self.queue or len(self.rows) >= self.most:
                    return
                mutant = self.queue.pop(0).make()
                if mutant is None or (self.only is not None and mutant.name not in self.only):
                    continue
                if mutant.name in self.known:
                    self.equivalent += 1
                    continue
                row: dict[str, Any] = {"file": mutant.path, "line": mutant.lines[0], "old": mutant.old, "new": mutant.new}
                self.rows.append(row)
            row |= worker.judge(mutant, self.reach)
            if row["status"] not in ("killed", "timeout"):
                print(f"{row['status']}: {mutant.path}:{mutant.lines[0]}\n  - {mutant.old}\n  + {mutant.new}", flush=True)

    def result(self, lines: int, possible: int) -> dict[str, Any]:
        """Return the room's row of the results file."""
        states = Counter(row["status"] for row in self.rows)
        killed = states["killed"] + states["timeout"]
        low, high = wilson(killed, len(self.rows))
        return {
            "room": self.room,
            "tests": ROOMS[self.room].split(),
            "lines": lines,
            "possible": possible,
            "sampled": len(self.rows) + self.equivalent,
            "killed": states["killed"],
            "timeout": states["timeout"],
            "survived": states["survived"],
            "not_reached": states["not reached"],
            "equivalent": self.equivalent,
            "score": {"value": round(killed / max(len(self.rows), 1), 4), "low": round(low, 4), "high": round(high, 4)},
            "survivors": [
                {key: row[key] for key in ("file", "old", "new")}
                for row in self.rows
                if row["status"] in ("survived", "not reached")
            ],
        }


def tried(
    room: str, given: argparse.Namespace, workers: Sequence[Worker], before: dict[str, Any], minutes: float
) -> dict[str, Any]:
    """Try the mutants of a room and return its row."""
    reach = measured(room, workers[0], given.longest)
    queue = drawn(room, given.seed, given.since)
    known = {(one["file"], one["old"], one["new"]) for one in yaml.safe_load(EQUIVALENT.read_text("utf-8")) or ()}
    only = None
    if given.again:
        only = {
            (one["file"], one["old"], one["new"])
            for row in before.get("rows", ())
            if row["room"] == room
            for one in row["survivors"]
        }
    trial = Trial(room, reach, list(queue), time.monotonic() + 60 * minutes, given.most, only, known)
    threads = [threading.Thread(target=trial.work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if given.log:
        given.log.mkdir(parents=True, exist_ok=True)
        (given.log / f"{room.replace('/', '-')}.json").write_text(json.dumps(trial.rows, indent=1), "utf-8")
    place = f"workbench/{room}"
    lines = sum(len(text.splitlines()) for path, text in sources().items() if path == place or path.startswith(place + "/"))
    row = trial.result(lines, len(queue))
    score = row["score"]
    print(
        f"{room}: {row['sampled']} of {row['possible']} mutants, {row['killed']} killed, {row['timeout']} too slow, {row['survived']} survived, "
        f"{row['not_reached']} not reached, {row['equivalent']} equivalent: {score['value']:.0%} [{score['low']:.0%}, {score['high']:.0%}]",
        flush=True,
    )
    return row


def main() -> None:
    parser = parser_of(__doc__, "mutants")
    parser.add_argument("--room", action="append", choices=list(ROOMS), help="a folder or file of workbench/; default: all")
    parser.add_argument("--since", help="only lines that differ from this commit; nothing is recorded")
    parser.add_argument("--minutes", type=float, default=10, help="time for trying mutants, over all rooms")
    parser.add_argument("--most", type=int, default=100, help="mutants of a room at most")
    parser.add_argument("--longest", type=float, default=30, help="seconds of tests for one mutant at most")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("--again", action="store_true", help="only the survivors of the results file; nothing is recorded")
    parser.add_argument("--log", type=Path, help="a folder for what became of each mutant")
    given = parser.parse_args()
    before = json.loads(given.out.read_text("utf-8")) if given.out.is_file() else {}
    rooms = given.room or list(ROOMS)
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        workers = [Worker(Path(place) / str(i)) for i in range(given.jobs)]
        done: dict[str, dict[str, Any]] = {}
        for room in rooms:
            done[room] = tried(room, given, workers, before, given.minutes / len(rooms))
            if not given.again and not given.since:
                record(given.out, before, done)
        for worker in workers:
            worker.stop()


def record(path: Path, before: dict[str, Any], done: dict[str, dict[str, Any]]) -> None:
    """Write the results file after each room, so that what is tried so far is kept."""
    kept = {row["room"]: row for row in before.get("rows", ())} | done
    write_results(path, {"rows": [kept[room] for room in ROOMS if room in kept]})
    if set(done) < set(kept):
        keep_head(path, before, list(done))


if __name__ == "__main__":
    main()

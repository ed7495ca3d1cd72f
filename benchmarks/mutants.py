"""Mutation score of a folder: small mistakes are made in its files one at a time, and tests that reach the line run until one fails.

    python benchmarks/mutants.py --minutes 10
    python benchmarks/mutants.py --room scores --since main
    python benchmarks/mutants.py --room resolve --again      the survivors of the results file once more

The changes are mutmut's, and three of our own (`mutation.py`). mutmut's runner makes none in decorated functions (one of seven here), in fields of
classes or at the top of a module, draws no sample, and forks with the caches of an earlier run; cosmic-ray starts a process a mutant, which is 5 s
of imports. So `mutant_server.py` forks a child a mutant from a process that has imported the libraries, and nothing of the package.

Not changed: docstrings, annotations, what errors and logs say, `__repr__`,
`assert`, and guards such as `strict=True`. A seeded sample takes each statement at most once before it takes one twice. A mutant is *killed*
when a test fails or takes three times as long in CPU time; it has *survived* the tests that reach its line, and then those that reach its file. A line
that no test reaches counts as survived. Known equivalents, in `equivalent_mutants.yaml` with the reason, are left out of the score.
Which tests reach which line is measured once and kept in .workbench/mutants. Slow tests do not run.
Results go to benchmarks/results/mutants.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mutant_tests import PROJECT, Reach, Worker
from mutation import Change, changes
from record import keep_head, parser_of, write_results

KEPT = PROJECT / ".workbench" / "mutants"
EQUIVALENT = PROJECT / "benchmarks" / "equivalent_mutants.yaml"
# A room and the folders and files of tests that are asked: another folder, where its subject is what the room does. They are measured once, which
# takes as long as they do, twice over; `run` serves every kind of step, and asks of each kind the tests that execute recipes.
ROOMS = {
    "merge": "merge upkeep/test_show.py advice/test_advise.py",
    "weights": "weights merge adapters vocabulary bricks upkeep/test_extract.py",
    "adapters": "adapters run upkeep/test_extract.py",
    "edit/closed_form": "edit",
    "scores": "scores compare evaluate/test_groups.py evaluate/test_score_integrity.py evaluate/test_bad_suites.py evaluate/test_evaluate.py",
    "compare": "compare scores report/test_fact_report.py",
    "ground/identity.py": "resolve weights run/test_inputs_change.py run/test_seal.py",
    "resolve": "resolve run recipe adapters vocabulary upkeep/test_rebase.py bricks/test_neuron_bricks.py bricks/test_origin.py grow/test_stack_sources.py",
    "run": "run resolve recipe adapters cli/test_chat.py edit/test_edit_end.py edit/test_edit_plan.py edit/test_edit_steps.py edit/test_memories.py "
    "edit/test_memory_versions.py edit/test_scale_neurons.py edit/test_sequence.py edit/test_steer.py edit/test_stream_runs.py fuse/test_fuse.py "
    "grow/test_components.py grow/test_grow.py grow/test_grow_training.py grow/test_growth_checks.py grow/test_growth_streamed.py "
    "merge/test_core_space.py merge/test_neuron_masks.py route/test_roles.py train/test_train_runs.py upkeep/test_extract.py weights/test_device.py",
    "route": "route run/test_routed.py run/test_routed_merges.py run/test_brick_statistics.py cli/test_route.py recipe/test_route_steps.py",
}


def sources() -> dict[str, str]:
    """Path within the checkout -> text, of every file of the rooms."""
    found = {}
    for room in ROOMS:
        place = PROJECT / "workbench" / room
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found[str(path.relative_to(PROJECT))] = path.read_text("utf-8")
    return found


def measured(room: str, worker: Worker, longest: float) -> Reach:
    """Return what the tests of a room reach; files of tests that are as they were when they were measured do not run again."""
    reach, now, files = Reach(longest), sources(), list[Path]()
    for place in ROOMS[room].split():
        path = worker.folder / "tests" / place  # which the checkout may have left behind by now
        files += sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
    kept = {str(file.relative_to(worker.folder)): KEPT / f"{file.stem}-{digest_of(file.read_bytes())}.json" for file in files}
    if new := [name for name, place in kept.items() if not place.is_file()]:
        print(f"{room}: measuring which lines the tests of {len(new)} files reach", flush=True)
        KEPT.mkdir(parents=True, exist_ok=True)
        worker.start()
        part = KEPT / f"{os.getpid()}.part"
        answer = worker.ask(tests=new, limit=3600, measure=str(part), rooms=[f"workbench/{name}" for name in ROOMS])
        if not part.is_file():
            sys.exit(f"the tests of {' '.join(new)} did not end: {answer}")
        found = json.loads(part.read_text("utf-8"))
        part.unlink()
        if found["failed"]:
            print(f"left out, since they fail without a mutant: {' '.join(found['failed'])}", flush=True)
        keep(found, {name: kept[name] for name in new}, now)
    shared: dict[str, dict[str, Any]] = {}
    for part in kept.values():
        found = json.loads(part.read_text("utf-8"))
        name = found["session"]
        shared[name] = shared.get(name) or json.loads((KEPT / name).read_text("utf-8"))
        reach.add({**found, **shared[name]}, now)
    return reach


def keep(found: dict[str, Any], kept: dict[str, Path], texts: dict[str, str]) -> None:
    """Write what each file of tests reaches, and once what all have in common: the texts of the package's files, and the libraries."""
    session = json.dumps({"texts": texts, "libraries": found["libraries"]})
    name = f"session-{digest_of(session.encode())}.json"
    (KEPT / name).write_text(session, "utf-8")
    for file, place in kept.items():
        mine = f"{file}::"
        reach = {
            path: {line: own for line, tests in lines.items() if (own := [test for test in tests if test.startswith(mine)])}
            for path, lines in found["reach"].items()
        }
        seconds = {test: took for test, took in found["seconds"].items() if test.startswith(mine)}
        place.write_text(json.dumps({"session": name, "reach": reach, "seconds": seconds}), "utf-8")


def digest_of(content: bytes) -> str:
    """Return a digest of a file's content, for its name."""
    return hashlib.sha256(content).hexdigest()[:16]


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
        counts = {state.replace(" ", "_"): states[state] for state in ("killed", "timeout", "survived", "not reached")}
        left = [{key: row[key] for key in ("file", "old", "new", "status")} for row in self.rows if row["status"] in LEFT]
        sampled = len(self.rows) + self.equivalent
        head = {"room": self.room, "tests": ROOMS[self.room].split(), "lines": lines, "possible": possible, "sampled": sampled}
        return scored({**head, **counts, "equivalent": self.equivalent, "survivors": left})

    def corrected(self, earlier: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a sample whose survivors were tried again; those whose line is gone leave the sample."""
        before = {(one["file"], one["old"], one["new"]): one["status"] for one in earlier["survivors"]}
        waiting = {mutant.name for change in self.queue if (mutant := change.make())}  # the time was over
        now = {name: status for name, status in before.items() if name in waiting}
        now |= {(row["file"], row["old"], row["new"]): row["status"] for row in self.rows}
        new = {**earlier, "tests": ROOMS[self.room].split(), "survivors": [], "again": True}
        for one in earlier["survivors"]:
            name = one["file"], one["old"], one["new"]
            new[one["status"].replace(" ", "_")] -= 1
            if name in self.known:
                new["equivalent"] += 1
            elif name in now:
                new[now[name].replace(" ", "_")] += 1
                new["survivors"] += [{**one, "status": now[name]}] if now[name] in LEFT else []
            else:
                new["sampled"] -= 1
        return scored(new)


LEFT = ("survived", "not reached")
"""A mutant that no test notices ends in one of these."""


def scored(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the share of the noticed mutants, without equivalents, and its interval."""
    total, killed = row["sampled"] - row["equivalent"], row["killed"] + row["timeout"]
    low, high = wilson(killed, total)
    return {**row, "score": {"value": round(killed / max(total, 1), 4), "low": round(low, 4), "high": round(high, 4)}}


def tried(
    room: str, given: argparse.Namespace, workers: Sequence[Worker], before: dict[str, Any], minutes: float
) -> dict[str, Any]:
    """Try the mutants of a room and return its row."""
    reach = measured(room, workers[0], given.longest)
    queue = drawn(room, given.seed, given.since)
    known = {(one["file"], one["old"], one["new"]) for one in yaml.safe_load(EQUIVALENT.read_text("utf-8")) or ()}
    earlier = next((row for row in before.get("rows", ()) if row["room"] == room), None) if given.again else None
    only = None
    if earlier:
        only = {(one["file"], one["old"], one["new"]) for one in earlier["survivors"]}
        queue = [one for one in queue if any(one.holds(*name[:2]) for name in only)]
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
    row = trial.corrected(earlier) if earlier else trial.result(lines, len(queue))
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
    parser.add_argument("--again", action="store_true", help="only the survivors of the results file")
    parser.add_argument("--log", type=Path, help="a folder for what became of each mutant")
    given = parser.parse_args()
    before = json.loads(given.out.read_text("utf-8")) if given.out.is_file() else {}
    rooms = given.room or list(ROOMS)
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        workers = [Worker(Path(place) / str(i)) for i in range(given.jobs)]
        done: dict[str, dict[str, Any]] = {}
        for room in rooms:
            done[room] = tried(room, given, workers, before, given.minutes / len(rooms))
            if not given.since:
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

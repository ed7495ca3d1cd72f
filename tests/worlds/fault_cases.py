"""Commands under faults: the project that they run in, how each may end, and whether the same command then gives the right files."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from worlds.fault_commands import COMMANDS, Command
from worlds.faults import KINDS, Fault, Faults, Outcome
from worlds.hub_server import HubServer
from worlds.json_commands import write_project
from worlds.project import Project
from worlds.tiny import save_adapter, save_finetuned, save_model
from worlds.upload_server import UploadServer

# What differs between two runs that give the same result: times, and the process that wrote.
_VOLATILE = {"seconds", "time", "date", "peak_bytes", "started", "finished", "pid", "command", "tokens_per_second", "created"}
# What depends on which part of the work an earlier call has done.
_VOLATILE |= {"check", "resumed"}
# Without a compiler, the same result is computed by other means, which its record says.
_VOLATILE |= {"kernels", "compiler", "reason"}
# Files that are being written, by `files.atomic_write` and by safetensors, and folders whose content is being made.
_SCRATCH = re.compile(r"(^|/)\.([^/]+\.\d+$|tmp\w{6}$|(making|new)-)")
# Locks, and files in which each call or process has lines of its own.
_OWN = re.compile(r"\.(lock|holder)$|(^|/)(log\.jsonl|journal\.log|calls/[0-9a-f]+\.json)$")
# What a command makes again if it is missing.
_CACHE = re.compile(r"^\.(workbench|user)/")
_TIME = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?|\d{1,2} [A-Z][a-z]+ \d{4}, \d\d:\d\d|seconds: [\d.]+")
_HOUR = 3600


def save_models(folder: Path) -> Path:
    """Write the model `base` and `bricks` of it, which all projects share."""
    base = save_model(folder / "base", "llama")
    for seed, name in enumerate(("one", "two", "three"), 1):
        save_adapter(base, folder / "bricks" / name, seed=seed)
    save_finetuned(base, folder / "bricks" / "full", seed=4)
    return folder


class World:
    """A project and the files that a command writes in it without a fault.

    Args:
        faults: The server.
        folder: An empty folder.
        models: What `save_models` has written.
        command: The command.
    """

    def __init__(self, faults: Faults, folder: Path, models: Path, command: Command) -> None:
        self.faults, self.command, self.place, self.start = faults, command, folder / "project", folder / "start"
        self._open = ExitStack()
        self.hub: UploadServer | HubServer | None = None
        if command.hub:
            self.hub = self._open.enter_context(UploadServer() if command.hub == "uploads" else HubServer())
        if isinstance(self.hub, HubServer):
            self.hub.repositories["HuggingFaceTB/SmolLM2-135M-Instruct"] = models / "base"
        (self.place / "recipes").mkdir(parents=True)
        for link in models.iterdir():
            (self.place / link.name).symlink_to(link)
        write_project(Project(self.place))
        for step in command.after:
            if callable(step):
                step(self.place)
            else:
                done = faults.call(Command(step), self.place)
                assert done.codes == [0], f"{step}: {done}"
        self.place.rename(self.start)
        self.before = files(self.start)
        self.counts: dict[str, int] = {}
        self.fired = 0
        """Faults that have happened: another order of threads may make fewer calls than were counted."""
        first, second = self._without_fault(), self._without_fault()
        assert not differences(first, second), f"two runs of {command.line} differ: {differences(first, second)}"
        self.right = first
        # The same command after the command may do nothing, refuse to write over its result, or do the same once more.
        self.codes = {0, *self._call().codes}
        self.twice = self._files()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_args: object) -> None:
        self._open.close()
        shutil.rmtree(self.place, ignore_errors=True)

    def _without_fault(self) -> dict[str, Any]:
        self._renew()
        done = self._call()
        assert {*done.codes} == {0}, f"{self.command.line}: {done}"
        self.counts = done.counts
        return self._files()

    def _renew(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.start, self.place, symlinks=True)
        if isinstance(self.hub, UploadServer):
            self.hub.repositories.clear()
            self.hub.objects.clear()

    def _call(self, fault: Fault | None = None) -> Outcome:
        return self.faults.call(self.command, self.place, fault, self.hub.url if self.hub else None)

    def _files(self) -> dict[str, Any]:
        """Return what `files` gives for the project, and what has arrived at the hub."""
        found = files(self.place)
        for name, repository in self.hub.repositories.items() if isinstance(self.hub, UploadServer) else ():
            found |= {f"{name}/{file}": _TIME.sub(b"", data) for file, data in repository.files().items()}
        return found

    def cases(self) -> list[Fault]:
        """Return every fault that can happen in the command: each call fails, or is the last; each write is cut short, or torn."""
        return [
            Fault(kind, n, mode)
            for kind in KINDS
            for mode in (("fail", "kill", "short", "torn") if kind == "write" else ("fail", "kill"))
            for n in range(1, self.counts[kind] + 1)
        ]

    def sample(self, count: int | None) -> list[Fault]:
        """Return at most `count` of the cases, the same each time: every kind and mode first, then others; None for all cases."""
        cases = self.cases()
        random.Random(self.command.line).shuffle(cases)
        seen: dict[tuple[str, str], int] = {}
        order = []
        for case in cases:
            rank = seen[case.kind, case.mode] = seen.get((case.kind, case.mode), -1) + 1
            order.append((rank, case))
        return [case for _, case in sorted(order, key=lambda pair: pair[0])[:count]]

    def problems(self, fault: Fault) -> Iterator[str]:
        """Run the command with a fault, then once more without, and yield what is wrong after either."""
        self._renew()
        done = self._call(fault)
        if not done.fired:
            return
        self.fired += 1
        left = self._files()
        yield from (f"{fault}: {text}" for text in self._after_fault(fault, done, left))
        for name in left:
            if _SCRATCH.search(name) and name not in self.before:  # old enough for no process to be writing it
                path = self.place / name
                long_ago = path.lstat().st_mtime - 2 * _HOUR
                os.utime(path, (long_ago, long_ago), follow_symlinks=False)
        again = self._call()
        if not {*again.codes} <= self.codes:
            yield f"{fault}: the same command again ends with {again.codes}: {again.err[-400:]}"
        found = {name: content for name, content in self._files().items() if not (_CACHE.search(name) and _SCRATCH.search(name))}
        if (wrong := differences(self.right, found)) and differences(self.twice, found):
            yield f"{fault}: the same command again leaves {wrong[:4]}"

    def _after_fault(self, fault: Fault, done: Outcome, left: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong with the end of the command, and with the user's files."""
        if None in done.codes:
            yield f"hangs: {done.err[-600:]}"
        killed = [
            code for code in done.codes if code == -9 or (code == -6 and fault.kind == "allocate")
        ]  # Rust's libraries abort
        if bad := [code for code in done.codes if code is not None and code not in (0, 1, *killed)]:
            yield f"ends with {bad}: {done.err[-600:]}"
        if "Traceback" in done.err or (1 in done.codes and "error:" not in done.err):
            yield f"no named error: {done.err[-600:]}"
        if fault.mode == "short" and {*done.codes} != {0}:
            yield f"a short write, which is allowed, is an error: {done.err[-300:]}"
        wrong = [text for text in differences(self.right, left) if not _CACHE.search(text)]
        if fault.kind == "remove":  # what could not be removed goes with the next command
            wrong = [text for text in wrong if not text.endswith(" added")]
        if {*done.codes} == {0} and wrong:
            yield f"succeeds and leaves {wrong[:4]}"
        if not killed and fault.kind != "remove" and (litter := [n for n in left if _SCRATCH.search(n) and n not in self.before]):
            yield f"leaves {litter[:3]}"
        for name, content in self.before.items():
            # What the command changes is as before or as after it, and nothing between; what it does not change is as before.
            # A manifest names the files that are being changed meanwhile.
            possible = [content, self.right.get(name)]
            if not _CACHE.search(name) and not name.endswith("manifest.json") and left.get(name) not in possible:
                yield f"{name}, which was there before, is {'changed' if name in left else 'gone'}"


def shares(count: int) -> dict[str, int]:
    """Return name of a command -> its part of a sample of so many faults."""
    whole = sum(command.share for command in COMMANDS.values())
    parts = {name: count * command.share // whole for name, command in COMMANDS.items()}
    for name in sorted(COMMANDS, key=lambda name: -COMMANDS[name].share)[: count - sum(parts.values())]:
        parts[name] += 1
    return parts


def files(folder: Path) -> dict[str, Any]:
    """Return the content of every file, without what differs between two equal results: locks, logs, times, digests of files with times."""
    found: dict[str, Any] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            inside = path.relative_to(folder).as_posix()
            if _OWN.search(inside) or inside.startswith((".tmp/", ".hub/")):
                continue
            if path.is_symlink():
                found[inside] = path.readlink()
            elif path.suffix == ".json":
                found[inside] = _steady(_json(path))
            else:
                found[inside] = _TIME.sub(b"", path.read_bytes())
            if name == "workbench-manifest.json" and isinstance(found[inside], dict):
                found[inside] = {**found[inside], "files": sorted(found[inside]["files"])}
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return path.read_bytes()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        volatile = _VOLATILE | ({"version"} if "compiler" in value else set())
        return {key: _steady(inner) for key, inner in value.items() if key not in volatile}
    return [_steady(inner) for inner in value] if isinstance(value, list) else value


def differences(right: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the files that are missing, added or different."""
    texts = dict.fromkeys(right.keys() - found.keys(), "missing") | dict.fromkeys(found.keys() - right.keys(), "added")
    texts |= {name: "different" for name in right.keys() & found.keys() if right[name] != found[name] and "/tasks/" not in name}
    return [f"{name} {text}" for name, text in sorted(texts.items())]

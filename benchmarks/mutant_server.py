"""A process that has imported the libraries, and forks one child for each run of tests of the checkout that is its working directory.

It reads a list of libraries to import, then one JSON object a line, `{"tests": [...], "limit": seconds, "measure": file or null}`, and answers with one:
`{"status": "passed" | "failed" | "timeout", "seconds": ..., "output": last lines}`. Nothing of the package is imported before the fork,
so a child imports the files as they are then. With `measure`, the child also writes which tests reach which lines.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OURS = ("workbench", "worlds", "tests", "conftest", "test_", "__main__", "mutant", "record", "_pytest", "pytest", "xdist")
FIRST = (
    "torch",
    "transformers",
    "peft",
    "safetensors.torch",
    "scipy.stats",
    "typer",
    "rich",
    "pydantic",
    "numpy",
    "yaml",
    "hypothesis",
)
MOST_BYTES = 8 << 30
"""A child may allocate no more: a mutant may ask for a tensor of any size."""


class Measure:
    """A plugin of pytest that notes which test, or which shared fixture, reaches which lines."""

    def __init__(self, file: str, rooms: list[str]) -> None:
        from coverage import Coverage

        include = [f"{Path.cwd()}/{room}" + ("" if room.endswith(".py") else "/*") for room in rooms]
        self.file, self.coverage = file, Coverage(data_file=None, include=include, config_file=False)
        self.stack = [""]
        self.fixtures: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def switch(self) -> None:
        """Let lines from now on count for the innermost of what runs."""
        self.coverage.switch_context(self.stack[-1])

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Let lines count for one test or fixture."""
        self.stack.append(name)
        self.switch()
        yield
        self.stack.pop()
        self.switch()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        """A test, with what its own fixtures do."""
        self.fixtures[item.nodeid] = list(getattr(item, "fixturenames", []))
        with self.within(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        """A fixture that several tests share counts for each of them."""
        if fixturedef.scope == "function":
            return (yield)
        with self.within(f"fixture {fixturedef.baseid} {fixturedef.argname}"):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Times, and tests that cannot be used."""
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def write(self) -> None:
        """Write file -> line -> tests, the tests' seconds, and the libraries that they need."""
        self.coverage.stop()
        data = self.coverage.get_data()
        users: dict[str, list[str]] = defaultdict(list)
        for test, names in self.fixtures.items():
            for name in names:
                users[name].append(test)
        reach: dict[str, dict[int, list[str]]] = {}
        for path in sorted(data.measured_files()):
            lines = reach.setdefault(str(Path(path).relative_to(Path.cwd())), {})
            for line, contexts in data.contexts_by_lineno(path).items():
                tests: set[str] = set()
                for context in contexts:
                    kind, _, rest = context.partition(" ")
                    if kind != "fixture":
                        tests.add(context)
                        continue
                    base, _, name = rest.rpartition(" ")
                    tests |= {test for test in users[name] if test.startswith(base)}
                lines[line] = sorted(tests - self.failed - {""})
        libraries = [name for name in sys.modules if not name.startswith(OURS)]
        seconds = {test: round(took, 3) for test, took in self.seconds.items() if test not in self.failed}
        document = {"reach": reach, "seconds": seconds, "failed": sorted(self.failed), "libraries": libraries}
        Path(self.file).write_text(json.dumps(document), "utf-8")


def child(job: dict[str, Any], log: Path) -> None:
    """Run tests and end the process with pytest's status."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(job["limit"]), resource.RLIM_INFINITY))
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    plugins = []
    if job.get("measure"):
        plugins.append(Measure(job["measure"], job["rooms"]))
        plugins[0].coverage.start()
    stop = [] if plugins else ["-x"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=line", f"--basetemp={Path.cwd()}-tests"]
    marks = ["-m", "not slow and not gpu and not browser and not starter"]
    code = int(pytest.main([*stop, *options, *marks, *job["tests"]], plugins=plugins))
    for plugin in plugins:
        plugin.write()
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    """Answer jobs until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    log = Path.cwd() / ".log"
    for name in [*FIRST, *json.loads(sys.stdin.readline())]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child's collections pass over the libraries
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        process = os.fork()
        if not process:
            with contextlib.ExitStack() as stack:
                stack.callback(os._exit, 70)  # whatever happens, a child does not go on as the server
                child(job, log)
        status = wait(process, job["limit"])
        output = log.read_text("utf-8", "replace")[-1500:] if log.is_file() else ""
        answer = {"status": status, "seconds": round(time.monotonic() - started, 2), "output": output}
        print(json.dumps(answer), file=replies, flush=True)


def wait(process: int, limit: float) -> str:
    """Wait for a child that ends itself after its CPU time; end it and what it started after five times as long, for one that hangs."""
    end = time.monotonic() + 5 * limit
    status = "timeout"
    while time.monotonic() < end:
        done, code = os.waitpid(process, os.WNOHANG)
        if done:
            status = "passed" if code == 0 else "failed"
            if os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGXCPU:
                status = "timeout"
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if status == "timeout":
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)
    return status


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    serve()

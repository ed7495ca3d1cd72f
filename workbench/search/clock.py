"""Running time of a search, including calls before an interruption, and the wait for other processes that share it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from workbench.ground.errors import UsageError
from workbench.ground.events import Events
from workbench.ground.files import read_json, write_json
from workbench.recipe.fields import seconds
from workbench.search.study import Study


def budget_seconds(text: str | None) -> float | None:
    """Return a time limit such as "30m" in seconds; None without one.

    Raises:
        UsageError: If it is not a time.
    """
    try:
        return None if text is None else seconds(text)
    except ValueError as error:
        raise UsageError(f"--budget {text}: {error}", "--budget 30m") from None


class Clock:
    """Time spent on a search by this call and by finished calls; calls that run at the same time do not count.

    Args:
        folder: Folder of the search.
        budget: Time limit in seconds, or None.
    """

    def __init__(self, folder: Path, budget: float | None) -> None:
        self.budget = budget
        self._folder = folder / "calls"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / f"{uuid.uuid4().hex}.json"
        self._lock = FileLock(self._file.with_suffix(".lock"))
        self._done = 0

    def __enter__(self) -> Clock:
        ended = {file.with_suffix(".json") for file in self._folder.iterdir() if file.suffix in (".json", ".lock")}
        self._before = sum(self._ended(file) for file in sorted(ended))
        self._lock.acquire()
        self._start = self._begun = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.tick(0)
        self._lock.release()
        self._file.with_suffix(".lock").unlink(missing_ok=True)

    def begin(self) -> None:
        """Mark the start of the first candidate; time before it does not count for the time per candidate."""
        self._begun = time.monotonic()

    def tick(self, candidates: int = 1) -> None:
        """Record that candidates are done."""
        self._done += candidates
        write_json(self._file, {"seconds": round(time.monotonic() - self._start, 3)})

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return self._before + time.monotonic() - self._start

    def over(self) -> bool:
        """Return True if the budget is used up."""
        return self.budget is not None and self.spent >= self.budget

    def left(self, done: int, total: int | None) -> str:
        """Return the approximate remaining time, such as "40 s" or "3 min"; empty if it cannot be estimated."""
        ends = []
        if self.budget is not None:
            ends.append(self.budget - self.spent)
        if total is not None and self._done:
            ends.append((time.monotonic() - self._begun) / self._done * (total - done))
        if not ends or min(ends) <= 0:
            return ""
        seconds = min(ends)
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

    def _ended(self, file: Path) -> float:
        try:
            with FileLock(file.with_suffix(".lock")).acquire(timeout=0):
                file.with_suffix(".lock").unlink(missing_ok=True)
                for unfinished in file.parent.glob(f".{file.name}.*"):  # the call was killed while it wrote
                    unfinished.unlink(missing_ok=True)
                return float((read_json(file) or {}).get("seconds", 0.0))
        except Timeout:
            return 0.0


PAUSE = 0.5
"""Seconds between two looks at the candidates of other processes."""


def until_all_end(study: Study, clock: Clock, events: Events, work: Callable[[], None]) -> None:
    """Score candidates, then wait for those of other processes, so that the result of every process has all candidates.

    A candidate whose process dies meanwhile is scored here, unless the time is used up.

    Args:
        study: The candidates.
        clock: Time of the search.
        events: Receiver of progress events.
        work: Function that scores candidates until none is left to start, or the time is used up.
    """
    announced = 0
    while True:
        work()
        others = study.others()
        if not others.running and (clock.over() or not others.abandoned):
            return
        if others.running and others.running != announced:
            announced = others.running
            number = "a candidate" if announced == 1 else f"{announced} candidates"
            events({"stage": "search", "text": f"waiting for {number} of other processes"})
        time.sleep(PAUSE)

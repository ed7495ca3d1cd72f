"""Limits of CPU time that hold on slow and on busy machines, for what is not made of steps that can be counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

REFERENCE = 0.03
"""CPU seconds of `_work` on the machine where the limits were set."""


def _work() -> float:
    """CPU seconds of a fixed piece of work."""
    begun = time.process_time()
    sum(i * i for i in range(1_000_000))
    return time.process_time() - begun


def in_limit(spent: float, limit: float) -> bool:
    """True if CPU seconds are within a limit; if they are not, the limit is that of a machine as slow as this one is now."""
    return spent < limit or spent < limit * max(_work() for _ in range(3)) / REFERENCE


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Fail if the block takes more CPU time than on a machine of the reference's speed."""
    begun = time.process_time()
    yield
    spent = time.process_time() - begun
    assert in_limit(spent, seconds), f"{spent:.1f} s of CPU time, at most {seconds:g} s"

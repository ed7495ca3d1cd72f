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


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Fail if the block takes more CPU seconds; if it does, the limit is that of a machine as slow as this one is now."""
    begun = time.process_time()
    yield
    spent = time.process_time() - begun
    if spent >= seconds:
        slower = max(1.0, max(_work() for _ in range(3)) / REFERENCE)
        assert spent < seconds * slower, f"{spent:.1f} s of CPU time, at most {seconds:g} s times {slower:.1f} for a slow machine"

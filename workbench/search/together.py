"""Processes that share a search: none of them ends while another one still scores a candidate."""

from __future__ import annotations

import time
from collections.abc import Callable

from workbench.events import Events
from workbench.search.clock import Clock
from workbench.search.study import Study

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
    told = 0
    while True:
        work()
        others = study.others()
        if not others.running and (clock.over() or not others.abandoned):
            return
        if others.running and others.running != told:
            told = others.running
            number = "a candidate" if told == 1 else f"{told} candidates"
            events({"stage": "search", "text": f"waiting for {number} of other processes"})
        time.sleep(PAUSE)

"""Progress of a whole evaluation, in one process or on several workers: the share that is done, and the time that the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from workbench.evaluate.lineup import LineupEntry
from workbench.ground.events import Whole
from workbench.scores.plan import ScorePlan
from workbench.scores.store import ScoreStore

COMPOSING = ""
"""Name of the work that comes before a configuration's plans: its weights are computed."""
_FIRST = 1.0
"""Seconds of work before which no remaining time is told."""


class Overall:
    """Tracks the work of an evaluation. Its pace is measured by kind: composing a configuration, and an item of each plan.

    Args:
        work: Configuration -> plan -> items to score, in the order of the work; a plan whose scores are stored has none.
        clock: Returns a time in seconds.
    """

    def __init__(self, work: Mapping[str, Mapping[str, int]], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = {name: dict(plans) for name, plans in work.items()}
        self._uncomposed = [name for name, plans in work.items() if any(plans.values())]
        self._total = sum(sum(plans.values()) for plans in work.values())
        self._of = len(work)
        self._spent: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._now: tuple[str, str, float] | None = None
        self._part = 0.0

    def begin(self, name: str, plan: str = COMPOSING) -> None:
        """Start composing a configuration, or scoring it under a plan; what was in progress before is finished."""
        self._close()
        self._now, self._part = (name, plan, self._clock()), 0.0

    def at(self, part: float) -> None:
        """Say which part of the work in progress is done, from 0 to 1."""
        self._part = part

    def finish(self) -> None:
        """Finish the work in progress."""
        self._close()

    def told(self) -> Whole:
        """Return `share` (from 0 to 1), `left` (seconds, None if it cannot be told yet), `finished` and `of` (configurations)."""
        scored = self._total - sum(sum(plans.values()) for plans in self._left.values())
        current = self._current() * self._part
        share = (scored + current) / self._total if self._total else 1.0
        finished = sum(not any(plans.values()) and name not in self._uncomposed for name, plans in self._left.items())
        return {"share": min(share, 1.0), "left": self._seconds_left(), "finished": finished, "of": self._of}

    def _current(self) -> int:
        """Return the number of items of the plan in progress."""
        return self._left.get(self._now[0], {}).get(self._now[1], 0) if self._now else 0

    def _close(self) -> None:
        if self._now is None:
            return
        name, plan, start = self._now
        if plan == COMPOSING:
            units = 1 if name in self._uncomposed else 0
            self._uncomposed = [other for other in self._uncomposed if other != name]
        else:
            units = self._left.get(name, {}).get(plan, 0) if self._part else 0  # without a part, its scores were stored
            if name in self._left:
                self._left[name][plan] = 0
        if units:
            self._spent[plan] = self._spent.get(plan, 0.0) + self._clock() - start
            self._done[plan] = self._done.get(plan, 0.0) + units
        self._now, self._part = None, 0.0

    def _seconds_left(self) -> float | None:
        """Return the time of the remaining work; a plan that was not scored yet has the mean pace of the others."""
        spent, done = dict(self._spent), dict(self._done)
        if self._now and self._now[1] != COMPOSING and self._part > 0:
            plan = self._now[1]
            spent[plan] = spent.get(plan, 0.0) + self._clock() - self._now[2]
            done[plan] = done.get(plan, 0.0) + self._part * self._current()
        scored = [plan for plan in done if plan != COMPOSING and done[plan] > 0]
        if not scored or sum(spent.values()) < _FIRST:
            return None
        mean = sum(spent[plan] for plan in scored) / sum(done[plan] for plan in scored)
        left = len(self._uncomposed) * spent.get(COMPOSING, 0.0) / max(done.get(COMPOSING, 0.0), 1.0)
        for plans in self._left.values():
            left += sum(n * (spent[plan] / done[plan] if plan in scored else mean) for plan, n in plans.items())
        if self._now and self._now[1] != COMPOSING:
            pace = spent[self._now[1]] / done[self._now[1]] if self._now[1] in scored else mean
            left -= self._part * self._current() * pace
        return max(left, 0.0)


class SideBySide:
    """Tracks an evaluation whose parts are scored by several workers at once. A part is a configuration under a plan.

    Args:
        names: All configurations.
        parts: (configuration, plan) -> items to score.
        clock: Returns a time in seconds.
    """

    def __init__(
        self, names: Sequence[str], parts: Mapping[tuple[str, str], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._names, self._open = clock, list(names), dict(parts)
        self._total = sum(parts.values())
        self._started: dict[tuple[str, str], float] = {}
        self._workers = 1
        self._spent: dict[str, float] = {}
        self._done: dict[str, int] = {}

    def begin(self, part: tuple[str, str]) -> None:
        """Start a part on an idle worker; a part whose worker was lost starts again."""
        self._started[part] = self._clock()
        self._workers = max(self._workers, len(self._started))

    def finish(self, part: tuple[str, str]) -> None:
        """Finish a part."""
        plan = part[1]
        self._spent[plan] = self._spent.get(plan, 0.0) + self._clock() - self._started.pop(part)
        self._done[plan] = self._done.get(plan, 0) + self._open.pop(part)

    def told(self) -> Whole:
        """Return `share`, `left`, `finished` and `of`, as `Overall.told` does; `share` counts finished parts only."""
        share = 1.0 - sum(self._open.values()) / self._total if self._total else 1.0
        unfinished = {name for name, _ in self._open}
        finished = sum(name not in unfinished for name in self._names)
        return {"share": share, "left": self._seconds_left(), "finished": finished, "of": len(self._names)}

    def _seconds_left(self) -> float | None:
        """Return the time of the unfinished parts, spread over the workers; a plan without a finished part has the others' mean pace."""
        spent, done = sum(self._spent.values()), sum(self._done.values())
        if not done or spent < _FIRST:
            return None
        left, now = 0.0, self._clock()
        for (name, plan), items in self._open.items():
            pace = self._spent[plan] / self._done[plan] if self._done.get(plan) else spent / done
            left += max(items * pace - (now - self._started.get((name, plan), now)), 0.0)
        return left / max(min(self._workers, len(self._open)), 1)


def overall(entries: Sequence[LineupEntry], plans: Sequence[ScorePlan], store: ScoreStore) -> Overall:
    """Return the tracker of an evaluation; configurations of equal weights are scored once.

    Args:
        entries: The configurations.
        plans: The plans, whose scorers are settled.
        store: Store of scores.
    """
    seen: set[tuple[str, str]] = set()
    work: dict[str, dict[str, int]] = {}
    for entry in entries:
        own = work.setdefault(entry.name, {})
        for plan in plans:
            key = entry.key(plan)
            known = key is not None and (store.has(plan, key) or (key, plan.place) in seen)
            own[plan.place] = 0 if known else sum(len(items) for items in plan.items.values())
            if key is not None:
                seen.add((key, plan.place))
    return Overall(work)

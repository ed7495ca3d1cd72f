"""Units of scores: how levels, differences and intervals are shown, with a dash for a missing value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison

from workbench.ground.numbers import MINUS, MISSING, count, fixed, signed
from workbench.ground.tables import Cell


@dataclass(frozen=True)
class Unit:
    """A score's unit: the factor from stored to shown values, the decimals, and the word after a difference."""

    scale: float
    decimals: int
    word: str

    @property
    def stored(self) -> str:
        """Return the word for the unit of stored values."""
        return "fraction" if self.scale == 100 else self.word

    def cell(self, text: str, value: float | None, *ends: float | None) -> Cell:
        """Return a table's cell with the stored value, and the ends of its interval, behind its text."""
        return Cell(text, {"": value, **dict(zip(("low", "high"), ends, strict=False))}, self.stored)

    def with_ends(self, diff: float | None, low: float | None, high: float | None) -> Cell:
        """Return a table's cell with a difference and its interval."""
        return self.cell(f"{self.diff(diff)} {self.diffs(low, high)}".strip(), diff, low, high)

    def interval(self, low: float | None, high: float | None) -> Cell:
        """Return a table's cell with an interval of differences."""
        return Cell(self.diffs(low, high), {"low": low, "high": high}, self.stored)

    def score(self, value: float | None) -> str:
        """Format a level, such as 55.0; a dash if it is missing."""
        return MISSING if value is None else fixed(value * self.scale, self.decimals)

    def diff(self, value: float | None) -> str:
        """Format a difference with its sign, such as +3.1; a value that rounds to zero has no sign."""
        return MISSING if value is None else signed(value * self.scale, self.decimals)

    def worded(self, value: float | None) -> str:
        """Format a difference with its unit, such as "+3.1 points"."""
        return f"{self.diff(value)} {self.word}".rstrip()

    def levels(self, low: float | None, high: float | None) -> str:
        """Format an interval of levels, such as [42.0, 67.1]; empty if an end is missing."""
        return "" if low is None or high is None else f"[{self.score(low)}, {self.score(high)}]"

    def diffs(self, low: float | None, high: float | None) -> str:
        """Format an interval of differences, such as [+1.2, +4.0]; empty if an end is missing."""
        return "" if low is None or high is None else f"[{self._end(low)}, {self._end(high)}]"

    def _end(self, value: float) -> str:
        """Format an end of an interval; one that rounds to zero keeps its sign, because it says on which side of zero the interval lies."""
        text = self.diff(value)
        return (MINUS if value < 0 else "+") + text if value and text[0] not in (MINUS, "+") else text

    def around(self, low: float | None, high: float | None) -> str:
        """Format an interval of differences for a sentence, such as "+1.2 to +4.0"."""
        return MISSING if low is None or high is None else f"{self._end(low)} to {self._end(high)}"


POINTS = Unit(100.0, 1, "points")
RAW = Unit(1.0, 3, "")
PERCENT = Unit(100.0, 0, "%")
NATS = Unit(1.0, 2, "nats")
RATIO_WORDS = {"bits_per_byte": "bits per byte"}


def raw(largest: float, word: str = "") -> Unit:
    """Return the unit of a metric that is not a share: three decimals, fewer for levels from 10 up, more for levels below 0.1."""
    if largest <= 0:
        return Unit(1.0, RAW.decimals, word)
    power = math.floor(math.log10(largest))
    return Unit(1.0, max(3 - power, 0) if power >= 0 else min(2 - power, 6), word)


def unit_of(view: Comparison, task: str) -> Unit:
    """Return the unit of a task's scores: points for shares of which higher is better, else the metric's own unit."""
    found, levels = view.task(task), view.levels.get(task, [])
    if found and found.contrast:  # its scores can be negative, so its unit is that of its first task
        points = view.task(found.contrast.of) is not None and unit_of(view, found.contrast.of) == POINTS
        return POINTS if points else raw(max(map(abs, levels), default=0.0))
    return unit_for(levels, found.lower, found.ratio) if found else unit_for(levels)


def unit_for(levels: Sequence[float], lower: bool | None = False, ratio: str | None = None) -> Unit:
    """Return the unit of scores from all levels of a task; `lower`: lower is better; `ratio`: lm-eval's name of a ratio."""
    if lower or ratio or not all(0 <= v <= 1 for v in levels):
        return raw(max(map(abs, levels), default=0.0), RATIO_WORDS.get(ratio or "", ""))
    return POINTS


def counted(value: int | None) -> Cell:
    """Return a table's cell with a whole number."""
    return Cell(count(value), {"": value})

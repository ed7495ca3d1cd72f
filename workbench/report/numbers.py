"""Number formats of reports: a typographic minus sign, fixed decimals, a dash for a missing value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison

from workbench.ground.tables import Cell

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


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
        return "" if low is None or high is None else f"[{self.diff(low)}, {self.diff(high)}]"

    def around(self, low: float | None, high: float | None) -> str:
        """Format an interval of differences for a sentence, such as "+1.2 to +4.0"."""
        return MISSING if low is None or high is None else f"{self.diff(low)} to {self.diff(high)}"


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


def fixed(value: float, decimals: int) -> str:
    """Format a number with fixed decimals, without a negative zero."""
    text = f"{abs(value):.{decimals}f}"
    return MINUS + text if value < 0 and float(text) != 0 else text


def signed(value: float, decimals: int) -> str:
    """Format a number like `fixed`, with a plus sign before positive numbers."""
    text = fixed(value, decimals)
    return "+" + text if value > 0 and float(text) != 0 else text


def p_value(p: float | None) -> str:
    """Format a p value with three decimals, or as <0.001."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float | None) -> str:
    """Format a whole number with thin spaces between thousands."""
    return MISSING if value is None else f"{round(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def counted(value: int | None) -> Cell:
    """Return a table's cell with a whole number."""
    return Cell(count(value), {"": value})


def about(value: float | None) -> str:
    """Format a whole number rounded up to two significant digits, for approximate sizes such as "about 1 900 items"."""
    if value is None:
        return MISSING
    step = 10 ** max(len(str(round(value))) - 2, 0)
    return count(-(-round(value) // step) * step)


def seconds(value: float | None) -> str:
    """Format a duration: 0.8 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if value is None:
        return MISSING
    if value < 10:
        return f"{value:.1f} s"
    total = round(value)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def plural(number: int, word: str) -> str:
    """Format a number with its noun: 1 task, 2 tasks."""
    return f"{count(number)} {word}" if number == 1 else f"{count(number)} {word}s"


def listed(words: Iterable[str]) -> str:
    """Join words for a sentence: a, b and c."""
    parts = list(words)
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def few(names: Sequence[str]) -> str:
    """Return the first names of a list, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unbroken(text: str) -> str:
    """Replace spaces by no-break spaces, so that the text stays on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def amount(value: float | None) -> str:
    """Format a large number with three significant digits: 512, 1.65 M, 7.24 B."""
    return _scaled(value, ("", "K", "M", "B", "T"))


def size(value: float | None) -> str:
    """Format bytes with three significant digits, in powers of ten: 96 B, 3.31 MB, 16.1 GB."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def small(value: float | None) -> str:
    """Format a small positive number such as a tolerance: 0, 3.1e-06, 0.0001."""
    return MISSING if value is None else f"{value:.2g}"


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return MISSING
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    figures = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{figures}f}\N{NO-BREAK SPACE}{units[power]}".rstrip("\N{NO-BREAK SPACE}")

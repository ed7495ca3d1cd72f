"""Numbers and lists in sentences and tables: a typographic minus sign, no sign before zero, a dash for a missing value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def fixed(value: float, decimals: int, *, minus: str = MINUS, thousands: str = "") -> str:
    """Format a number with fixed decimals; a value that rounds to zero has no sign.

    Args:
        value: The number.
        decimals: Number of decimals.
        minus: Sign of negative numbers; "-" for a terminal's tables.
        thousands: Separator between thousands, such as ",".
    """
    text = f"{abs(value):,.{decimals}f}"
    sign = minus if value < 0 and text.strip("0.") else ""
    return sign + text.replace(",", thousands)


def signed(value: float, decimals: int, *, minus: str = MINUS, thousands: str = "") -> str:
    """Format a number like `fixed`, with a plus sign before positive numbers."""
    text = fixed(value, decimals, minus=minus, thousands=thousands)
    return "+" + text if value > 0 and text.strip("0.") else text


def figures(value: float, digits: int, *, plus: bool = False) -> str:
    """Format a number with significant digits; zero has no sign.

    Args:
        value: The number.
        digits: Number of significant digits.
        plus: Put a plus sign before positive numbers.
    """
    text = f"{value:+.{digits}g}" if plus and value > 0 else f"{value + 0.0:.{digits}g}"  # −0.0 + 0.0 is 0.0
    return text.replace("-", MINUS)


def p_value(p: float | None) -> str:
    """Format a p value with three decimals, or as <0.001."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float | None) -> str:
    """Format a whole number with thin spaces between thousands."""
    return MISSING if value is None else f"{round(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


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

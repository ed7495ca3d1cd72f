"""Color scales of heat maps that do not depend on the values shown, with a neutral color for values that say nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from workbench.library.measure import DeltaSums

PALEST, DARKEST = 0.12, 0.7


@dataclass(frozen=True)
class Stop:
    """A value in the legend of a heat map, with the tint that cells of this value have.

    Attributes:
        text: The value.
        kind: Style class: "up" above the middle, "down" below.
        tint: Strength of the tint, 0 to 1.
    """

    text: str
    kind: str
    tint: float


@dataclass(frozen=True)
class TintScale:
    """A fixed scale from values to tints.

    Attributes:
        stops: Values that the legend shows.
        top: Distance from the middle that has the darkest tint; larger distances have it too.
        middle: Value without a tint.
        bend: Growth of the tint with the distance: in proportion to it, to its square root, or to its logarithm above `first`.
        first: Distance up to which a value has no tint on a logarithmic scale.
        reversed: Values above the middle are bad and have the style class "down".
    """

    stops: Sequence[float]
    top: float = 1.0
    middle: float = 0.0
    bend: Literal["linear", "root", "log"] = "linear"
    first: float = 0.0
    reversed: bool = False

    def tint(self, value: float) -> float:
        """Return the strength of a value's tint, from PALEST to DARKEST; NaN has the palest."""
        distance = abs(value - self.middle)
        if math.isnan(distance):
            return PALEST
        share = min(1.0, distance / self.top)
        if self.bend == "root":
            share = math.sqrt(share)
        elif self.bend == "log":
            share = max(0.0, 1.0 - math.log(share) / math.log(self.first / self.top)) if share > 0 else 0.0
        return round(PALEST + (DARKEST - PALEST) * share, 3)

    def kind(self, value: float) -> str:
        """Return the style class of a value: "up" is blue, "down" is orange."""
        return "up" if (value >= self.middle) != self.reversed else "down"

    def small(self, value: float) -> bool:
        """Return True if a value is too close to the middle for a tint on a logarithmic scale."""
        return self.bend == "log" and abs(value - self.middle) < self.first

    def legend(self, text: Callable[[float], str]) -> list[Stop]:
        """Return the stops of the legend.

        Args:
            text: Format of a value.
        """
        return [Stop(text(value), self.kind(value), self.tint(value)) for value in self.stops]


BFLOAT16 = 0.002
"""Relative norm of the change that rounding weights to bfloat16 makes, rounded up (about 0.17 % for normally distributed weights)."""
SCALES = {
    "relative": TintScale((0.002, 0.01, 0.05, 0.2, 1.0), bend="log", first=BFLOAT16),
    "norm": TintScale((0.01, 0.1, 1.0, 10.0, 100.0), top=100.0, bend="log", first=0.01),
    "zeros": TintScale((0.1, 0.25, 0.5, 1.0)),
    "cosine": TintScale((-1.0, -0.5, -0.1, 0.1, 0.5, 1.0), bend="root"),
    "conflict": TintScale((0.0, 0.25, 0.45, 0.55, 0.75, 1.0), top=0.5, middle=0.5, bend="root", reversed=True),
    "overlap": TintScale((0.02, 0.1, 0.3, 1.0), bend="root"),
    "recovered": TintScale((-1.0, -0.5, 0.25, 0.5, 1.0)),
}
"""Scales of the measures of bricks and of causal traces, by measure."""
SHARES = TintScale((0.1, 0.25, 0.5, 1.0))
"""Scale of shares and scores from 0 to 1."""
CHANGES = TintScale((-10.0, 1.0, 10.0, 100.0, 1000.0), top=1000.0, bend="log", first=1.0)
"""Scale of changes in percent."""
DIFFERENCE = TintScale((-1.0, -0.25, -0.05, 0.05, 0.25, 1.0), bend="root")
"""Scale of differences between scores: up to 100 points, or up to the score that they are compared with for metrics in their own unit."""


def inside(value: float, band: tuple[float, float] | None) -> bool:
    """Return True if a value lies in the band of values that chance explains."""
    return band is not None and band[0] <= value <= band[1]


def measured(sums: DeltaSums, key: str, other: str | None = None) -> float | None:
    """Return a measure of a brick, or of its similarity to another brick; None if it is undefined."""
    document: dict[str, Any] = sums.document()
    found: float | None = (document["others"].get(other, {}) if other else document).get(key)
    return found


def null_reason(sums: DeltaSums, key: str, value: float, other: str | None = None) -> str | None:
    """Return the reason why a measure of a brick says nothing, or None.

    Args:
        sums: The measures.
        key: "relative", "cosine", "conflict", "overlap" or another measure.
        value: The value of the measure.
        other: The brick that it compares with.
    """
    if key == "relative":
        return "no more than rounding to bfloat16 changes" if SCALES[key].small(value) else None
    meeting = sums.meetings.get(other) if other else None
    band = meeting.by_chance(sums.square).get(key) if meeting else None
    if band is None:
        return None
    if key == "overlap":
        return f"unrelated deltas have up to {100 * band[1]:.2g} %" if value <= band[1] else None
    if not inside(value, band):
        return None
    low, high = (f"{end:+.2g}".replace("-", "−") if key == "cosine" else f"{100 * end:.3g} %" for end in band)
    return f"95 % of unrelated deltas have {low} to {high}"

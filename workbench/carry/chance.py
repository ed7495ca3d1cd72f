"""The chance level of a match: what the same procedure gives when the source reads other words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SHUFFLES = 3
"""Number of exchanges of the source's tokens."""
LAYERS = 6
"""Largest number of layers on which the chance level is measured."""
MARGIN = 0.05
"""Least difference of a match from its chance level."""
WEAK = 0.2
"""Correlation below which a unit counts as weakly matched."""
CRITERION = (
    f"The mean matched correlation on held-out texts has to exceed each of {SHUFFLES} controls, and their mean by {MARGIN:g}. In a control "
    "the source reads the same texts with its tokens exchanged for others, and everything is fitted again."
)


@dataclass(frozen=True)
class Chance:
    """A match beside its chance level, on the same layers.

    Attributes:
        layers: Layers of the target.
        matched: Mean correlation of matched units.
        shuffled: The same for each control.
    """

    layers: tuple[int, ...]
    matched: float
    shuffled: tuple[float, ...]

    @property
    def level(self) -> float:
        """Mean of the controls."""
        return math.fsum(self.shuffled) / len(self.shuffled)

    @property
    def above(self) -> bool:
        """True if the match is above chance by `CRITERION`.

        Positions that are paired at random would be too weak a control: two unrelated models read the same tokens, and units that tell
        tokens apart correlate for that reason alone.
        """
        return self.matched > max(self.shuffled) and self.matched - self.level >= MARGIN


def chance_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """Return up to `LAYERS` of some layers, evenly spaced, first and last included."""
    count = min(LAYERS, len(layers))
    return tuple(layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count))

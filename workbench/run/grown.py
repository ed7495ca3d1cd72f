"""Result of a grow step in a composition, with the tensors that later steps have not changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workbench.grow.expansion.remap import GrownWeights
from workbench.models.layout import Model
from workbench.steps import GrowMethod, Growth


@dataclass
class GrownStep:
    """Result of a grow step in a composition.

    Attributes:
        id: The step's id.
        step: The step, after `GrowMethod.settled`.
        before: The model before growth.
        weights: The grown weights.
        kept: Name of a tensor after the step -> its current name, for tensors that no later step has changed.
    """

    id: str
    step: GrowMethod
    before: Model
    weights: GrownWeights
    kept: dict[str, str]

    def changed(self, names: Iterable[str]) -> None:
        """Record that a later step changes tensors, given by their current names."""
        lost = set(names)
        self.kept = {old: now for old, now in self.kept.items() if now not in lost}

    def renamed(self, growth: Growth) -> None:
        """Record that a later grow step renames tensors that it copies unchanged."""
        places: dict[str, str] = {}
        for name, grown in growth.tensors.items():
            if grown.verbatim:
                places.setdefault(grown.source, name)
        self.kept = {old: places[now] for old, now in self.kept.items() if now in places}

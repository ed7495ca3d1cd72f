"""A growth step of a composition, and which of its tensors later steps leave alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workbench.grow.expansion.remap import GrownWeights
from workbench.models.layout import Model
from workbench.steps import GrowMethod, Growth


@dataclass
class GrownStep:
    """A grow step of a composition.

    Attributes:
        id: The step's.
        step: Its method, settled.
        before: The model that it grew from.
        weights: What it made of that.
        kept: Tensor after the step -> its name now, of those that no later step has changed.
    """

    id: str
    step: GrowMethod
    before: Model
    weights: GrownWeights
    kept: dict[str, str]

    def changed(self, names: Iterable[str]) -> None:
        """A later step changes tensors, by their names now."""
        lost = set(names)
        self.kept = {old: now for old, now in self.kept.items() if now not in lost}

    def renamed(self, growth: Growth) -> None:
        """A later step grows: tensors that it takes over as they are have other names."""
        places: dict[str, str] = {}
        for name, grown in growth.tensors.items():
            if grown.verbatim:
                places.setdefault(grown.source, name)
        self.kept = {old: places[now] for old, now in self.kept.items() if now in places}

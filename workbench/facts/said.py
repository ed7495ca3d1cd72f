"""Counts of the facts that a model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from workbench.facts.facts import Fact
from workbench.results import Number, Part

_SHOWN = 5  # facts that a line names


class FactsSaid(Part):
    """Counts of the facts that a model says after an edit step."""

    facts: int
    """Number of facts that the step teaches."""
    said: int
    """Number of facts whose target the model says, by greedy decoding."""
    min_efficacy: Number
    """Smallest share of facts that the model must say, from 0 to 1."""
    not_said: list[str]
    """Ids of the facts that the model does not say."""

    @classmethod
    def of(cls, facts: Sequence[Fact], gives_target: Sequence[bool], min_efficacy: float) -> Self:
        """Count the facts whose target the model gives."""
        missing = [fact.id for fact, given in zip(facts, gives_target, strict=True) if not given]
        return cls(facts=len(facts), said=sum(gives_target), min_efficacy=min_efficacy, not_said=missing)

    @property
    def too_few(self) -> bool:
        """True if the model gives fewer targets than the step requires."""
        return self.said < self.min_efficacy * self.facts

    def __str__(self) -> str:
        """Return the counts in words: "46 of 48 facts (96 %); not said: a, b"."""
        more = f" and {len(self.not_said) - _SHOWN} more" if len(self.not_said) > _SHOWN else ""
        text = f"{self.said} of {self.facts} facts ({100 * self.said / max(1, self.facts):.0f} %)"
        return text + (f"; not said: {', '.join(self.not_said[:_SHOWN])}{more}" if self.not_said else "")

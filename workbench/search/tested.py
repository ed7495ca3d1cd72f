"""Configurations that were scored on both halves of a search's items."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.scores.store import Configuration
from workbench.search.objective import Answers
from workbench.search.race import Rival
from workbench.search.space import Values


@dataclass(frozen=True)
class Tested:
    """A configuration that was scored on both halves of the items.

    Attributes:
        rival: Its answers and scores on search items.
        configuration: The configuration.
        answers: Answers on test items.
        part: "control", "found" (the winner or a member of the Pareto front) or "random".
        values: Value by dimension, for candidates.
    """

    rival: Rival
    configuration: Configuration
    answers: Answers
    part: str
    values: Values | None = None

    @property
    def name(self) -> str:
        """Displayed name."""
        return self.rival.name

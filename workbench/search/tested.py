"""A configuration on both halves of a search's items."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.scores.store import Configuration
from workbench.search.objective import Answers
from workbench.search.race import Rival
from workbench.search.space import Values


@dataclass(frozen=True)
class Tested:
    """A configuration on both halves of the items.

    Attributes:
        rival: On the search items.
        configuration: Its weights.
        answers: On the test items.
        part: control, found (the winner, or of the front), or random.
        values: Of a candidate.
    """

    rival: Rival
    configuration: Configuration
    answers: Answers
    part: str
    values: Values | None = None

    @property
    def name(self) -> str:
        """As people call it."""
        return self.rival.name

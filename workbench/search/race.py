"""When a candidate is given up, and what it counts then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.evaluate.resident import GOLD
from workbench.search.objective import Answers, Objective, gap, gold_gap


@dataclass(frozen=True)
class Rival:
    """A configuration that has seen all items.

    Attributes:
        name: As people call it.
        answers: On all items.
        scores: Of the objectives; higher is better.
    """

    name: str
    answers: Answers
    scores: tuple[float, ...]

    @classmethod
    def of(cls, name: str, answers: Answers, objectives: Sequence[Objective]) -> Rival:
        """With its scores."""
        return cls(name, answers, tuple(answers.value(objective) for objective in objectives))


def front(rivals: Iterable[Rival]) -> list[Rival]:
    """Those that no other is at least as good as in every objective and better in one; of equals the first. One objective: the best."""
    found: list[Rival] = []
    for rival in rivals:
        if any(_covers(other.scores, rival.scores) for other in found):
            continue
        found = [other for other in found if not _covers(rival.scores, other.scores)] + [rival]
    return found


def _covers(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True))


def beaten_by(
    answers: Answers, rivals: Sequence[Rival], objectives: Sequence[Objective], level: float, gold: bool
) -> Rival | None:
    """The rival that a candidate lies below on the items seen so far: of every objective the paired interval lies below 0. With one
    objective and `gold`, a log-probability of right answers whose interval lies below 0 says the same earlier."""
    for rival in rivals:
        if all(gap(rival.answers, answers, objective).below(level) for objective in objectives):
            return rival
        if gold and len(objectives) == 1:
            difference = gold_gap(rival.answers, answers, objectives, GOLD)
            if difference is not None and difference.below(level) and gap(rival.answers, answers, objectives[0]).diff <= 0:
                return rival
    return None


def estimate(answers: Answers, rival: Rival, objectives: Sequence[Objective]) -> list[float]:
    """What a candidate that was given up would score on all items: the rival's score there, and the difference on the items that both
    have seen. Unlike its score on few items it does not depend on how hard these are."""
    return [score + gap(rival.answers, answers, o).diff for o, score in zip(objectives, rival.scores, strict=True)]

"""Early stopping of candidates, and the estimated scores of stopped candidates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.evaluate.models import GOLD
from workbench.search.objective import Answers, Objective, gap, gold_gap


@dataclass(frozen=True)
class Rival:
    """A configuration that was scored on all search items.

    Attributes:
        name: Displayed name.
        answers: Answers on all search items.
        scores: Scores under the objectives; higher is better.
    """

    name: str
    answers: Answers
    scores: tuple[float, ...]

    @classmethod
    def of(cls, name: str, answers: Answers, objectives: Sequence[Objective]) -> Rival:
        """Build a rival from its answers."""
        return cls(name, answers, tuple(answers.value(objective) for objective in objectives))


def front(rivals: Iterable[Rival]) -> list[Rival]:
    """Return the Pareto front, which for one objective is the best rival; of rivals with equal scores only the first is on it."""
    best: list[Rival] = []
    for rival in rivals:
        if any(_covers(other.scores, rival.scores) for other in best):
            continue
        best = [other for other in best if not _covers(rival.scores, other.scores)] + [rival]
    return best


def _covers(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True))


def beaten_by(
    answers: Answers, rivals: Sequence[Rival], objectives: Sequence[Objective], level: float, gold: bool
) -> Rival | None:
    """Return the rival that beats a candidate on the items so far, or None.

    A rival beats it if the interval of the paired difference is below 0 under every objective. With one objective and `gold`, it also beats it
    if the interval for the log-probability of right answers is below 0, which often shows earlier, and the objective is not better.

    Args:
        answers: The candidate's answers so far.
        rivals: Configurations that were scored on all items.
        objectives: Objectives of the search.
        level: Error rate of the intervals.
        gold: Also compare the log-probability of right answers.
    """
    for rival in rivals:
        if all(gap(rival.answers, answers, objective).below(level) for objective in objectives):
            return rival
        if gold and len(objectives) == 1:
            difference = gold_gap(rival.answers, answers, objectives, GOLD)
            if difference is not None and difference.below(level) and gap(rival.answers, answers, objectives[0]).diff <= 0:
                return rival
    return None


def estimate(answers: Answers, rival: Rival, objectives: Sequence[Objective]) -> list[float]:
    """Estimate the scores of a stopped candidate on all items: the rival's score plus the difference on the items that both have.

    Unlike the candidate's score on few items, this estimate does not depend on the difficulty of these items.
    """
    return [score + gap(rival.answers, answers, o).diff for o, score in zip(objectives, rival.scores, strict=True)]

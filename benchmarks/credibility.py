"""Statements that contradict each other, and feedback that is sometimes wrong: how soon the credible one leads. The source of the table in docs/memories.md.

    python benchmarks/credibility.py
    python benchmarks/credibility.py --runs 20       a quick look

A memory holds statements of one prompt, of which one is right. In each round the statement that leads by credibility is used and gets feedback: 1 if it is
right, 0 if not, and the opposite in a share of the rounds. Statements that lead together are drawn at random. Counted are the runs in which the right
statement leads alone after some rounds. Beside the memory's discounted LinUCB (workbench/facts/log.py) stand Thompson sampling with a beta prior, whose
leader is the one with the highest mean, and the best possible choice for equally many rounds: the statement with the highest posterior probability, given the
rate of wrong feedback, where each round asks about it. Results go to benchmarks/results/credibility.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from record import parser_of, write_results

from workbench.facts.log import Credibility, Use

ROUNDS = (1, 2, 3, 5, 10)
"""Rounds after which runs are counted, per statement."""
SETTINGS = ((0.5, 0.98), (0.5, 1.0), (0.25, 0.98), (1.0, 0.98), (0.1, 0.98))
"""Pairs of alpha and decay; the first is the memory's default."""


def main() -> None:
    """Simulate all ways with all numbers of statements, and write the results file."""
    parser = parser_of(__doc__, "credibility")
    parser.add_argument("--statements", type=int, nargs="+", default=[2, 5, 20])
    parser.add_argument("--wrong", type=float, default=0.1, help="share of the rounds with wrong feedback")
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    rows = []
    for count in options.statements:
        ways: dict[str, Callable[[np.random.Generator], Any]] = {
            f"alpha {alpha:g}, decay {decay:g}": partial(Bandits, count, alpha, decay) for alpha, decay in SETTINGS
        }
        ways["Thompson sampling"] = partial(Thompson, count)
        ways["best possible"] = partial(Posterior, count, options.wrong)
        for way, make in ways.items():
            found = np.array([simulated(make, count, options.wrong, seed) for seed in range(options.runs)])
            led = {str(rounds): int(hits) for rounds, hits in zip(ROUNDS, found.sum(0), strict=True)}
            rows.append({"statements": count, "way": way, "led": led})
            print(rows[-1], flush=True)
    write_results(options.out, {"runs": options.runs, "wrong": options.wrong, "rows": rows})


def simulated(make: Callable[[np.random.Generator], Any], count: int, wrong: float, seed: int) -> list[bool]:
    """Return for each number of rounds in ROUNDS whether the right statement leads alone after it."""
    draw = np.random.default_rng(seed)
    statements, right, found = make(draw), int(draw.integers(count)), []
    for number in range(1, count * ROUNDS[-1] + 1):
        used = int(draw.choice(_leaders(statements.asks())))
        statements.learn(used, float((used == right) != (draw.random() < wrong)))
        if number % count == 0 and number // count in ROUNDS:
            found.append(_leaders(statements.ranks()).tolist() == [right])
    return found


def _leaders(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.flatnonzero(scores >= scores.max() - 1e-12)


class Bandits:
    """The memory's own credibilities: every feedback is a version."""

    def __init__(self, count: int, alpha: float, decay: float, _draw: np.random.Generator) -> None:
        self.uses: list[list[Use]] = [[] for _ in range(count)]
        self.alpha, self.decay, self.version = alpha, decay, count

    def asks(self) -> np.ndarray[Any, Any]:
        """Return the score of each statement, of which the highest is used."""
        return np.array(
            [
                Credibility(self.version, stated, False, uses, self.alpha, self.decay, floor=0.0).score(1.0)
                for stated, uses in enumerate(self.uses, 1)
            ]
        )

    ranks = asks

    def learn(self, used: int, reward: float) -> None:
        """Add feedback on a statement."""
        self.version += 1
        self.uses[used].append(Use(self.version, 1.0, reward))


class Thompson:
    """Beta-Bernoulli bandits with a uniform prior."""

    def __init__(self, count: int, draw: np.random.Generator) -> None:
        self.counts, self.draw = np.ones((count, 2)), draw

    def asks(self) -> np.ndarray[Any, Any]:
        """Return a draw from each statement's posterior."""
        return self.draw.beta(self.counts[:, 0], self.counts[:, 1])

    def ranks(self) -> np.ndarray[Any, Any]:
        """Return the posterior means."""
        means: np.ndarray[Any, Any] = self.counts[:, 0] / self.counts.sum(1)
        return means

    def learn(self, used: int, reward: float) -> None:
        """Add feedback on a statement."""
        self.counts[used, 0 if reward else 1] += 1


class Posterior:
    """Log-probabilities that a statement is the one right one, where the rate of wrong feedback is known."""

    def __init__(self, count: int, wrong: float, _draw: np.random.Generator) -> None:
        self.logs, self.odds = np.zeros(count), math.log((1 - wrong) / wrong)

    def asks(self) -> np.ndarray[Any, Any]:
        """Return the log-probabilities up to a constant."""
        return self.logs

    ranks = asks

    def learn(self, used: int, reward: float) -> None:
        """Add feedback on a statement."""
        self.logs[used] += self.odds if reward else -self.odds


if __name__ == "__main__":
    main()

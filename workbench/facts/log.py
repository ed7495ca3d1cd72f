"""A memory's facts: the append-only log of their changes, and their credibility.

One line of the log is one change of one fact:

    {"version": 2, "action": "add", "id": "...", "time": "2026-01-31T12:00:00Z", "source": "added", "fact": {...}}

`action` is add, update, rm or feedback. Lines for add and update have the new fact, lines for feedback a `reward` and a `similarity`. All
lines of one command have the same version. Version 1 has the facts of the recipe, without a time, so that equal recipes give equal bytes.

Credibility is estimated from feedback by a linear bandit with decay. A use of a fact has a feature vector x, normalized to length 1, of [similarity of the prompt, freshness, recency, source]. At version V,
a fact that was stated at version c and last used at version u has freshness = g^(V - c) and recency = g^(V - u), with the decay g; source is
1 for facts of the recipe and 0 for facts that were added later. With rewards r_i in {0, 1} for uses x_i at versions v_i

    A = I + sum_i g^(V - v_i) x_i x_i^T,   b = sum_i g^(V - v_i) r_i x_i,   theta = A^-1 b,
    credibility(x) = theta^T x + alpha * sqrt(x^T A^-1 x)

which is LinUCB (Li et al. 2010, arXiv 1003.0146, algorithm 1) with discounted sums and one bandit per fact. DynaMind (arXiv 2310.14248) gives
facts such estimates; its short-term memory's decay is here the discount. Without feedback the credibility is alpha. After n rewards of 0 for
one use it is alpha / sqrt(1 + n), after n rewards of 1 it is n / (1 + n) + alpha / sqrt(1 + n). With further versions, both return to alpha.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from workbench.facts.facts import Fact, fact_of
from workbench.ground import jsondoc
from workbench.ground.errors import UsageError, WorkbenchError, nearest
from workbench.ground.files import write_bytes
from workbench.ground.lazy import np
from workbench.ground.results import JsonObject, Number, OpenJsonObject, Result, absent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Use:
    """A use of a fact with feedback: the version, the similarity of the prompt from 0 to 1, and the reward from 0 to 1."""

    version: int
    similarity: float
    reward: float


@dataclass(frozen=True)
class Credibility:
    """The bandit of one fact at one version.

    Attributes:
        version: The memory's version V.
        stated: The version at which the fact was added or last changed.
        recipe: Whether the fact is from the recipe.
        uses: Feedback since the fact was stated, oldest first.
        alpha: Weight of the uncertainty.
        decay: Discount g per version, from 0 to 1.
        floor: A fact with less credibility is not used.
    """

    version: int
    stated: int
    recipe: bool
    uses: Sequence[Use]
    alpha: float
    decay: float
    floor: float

    def score(self, similarity: float) -> float:
        """Return the credibility for a prompt with a given similarity."""
        matrix, reward = self._bandit
        x = self._features(self.version, similarity, self.uses[-1].version if self.uses else self.stated)
        inverse = np.linalg.inv(matrix)
        return float(x @ inverse @ reward + self.alpha * np.sqrt(x @ inverse @ x))

    @property
    def kept(self) -> bool:
        """True if the fact is used: its credibility for its own prompt is at least the floor."""
        return self.score(1.0) >= self.floor

    @cached_property
    def _bandit(self) -> tuple[NDArray[np.float64], Vector]:
        """The matrix A and the vector b at the version."""
        matrix, reward = np.eye(4), np.zeros(4)
        last = self.stated
        for use in self.uses:
            x = self._features(use.version, use.similarity, last)
            weight = self.decay ** (self.version - use.version)
            matrix += weight * np.outer(x, x)
            reward += weight * use.reward * x
            last = use.version
        return matrix, reward

    def _features(self, version: int, similarity: float, last: int) -> Vector:
        """Return x at a version, for a fact that was last used at version `last`."""
        recency_stated, recency_used = self.decay ** (version - self.stated), self.decay ** (version - last)
        x = np.array([similarity, recency_stated, recency_used, float(self.recipe)])
        features: Vector = x / np.linalg.norm(x)
        return features


LOG = "log.jsonl"
ADD, UPDATE, REMOVE, FEEDBACK = "add", "update", "rm", "feedback"
RECIPE, ADDED = "recipe", "added"


@dataclass(frozen=True)
class Alive:
    """A fact at one version.

    Attributes:
        fact: The fact as it was last stated.
        stated: The version at which it was last stated, which is also the version of its stored tensors.
        source: "recipe" or "added".
        uses: Feedback since that version.
    """

    fact: Fact
    stated: int
    source: str
    uses: tuple[Use, ...] = ()


class MemoryChange(OpenJsonObject, Result):
    """A change of one fact of a memory."""

    version: int
    """Version of the memory that the change belongs to."""
    action: str
    """add, update, rm or feedback."""
    id: str
    """Id of the fact."""
    time: str | None = None
    """Time of the change (ISO 8601, UTC); null for facts of the recipe."""
    source: str | None = absent()
    """"recipe" or "added", for facts that were added."""
    fact: dict[str, object] | None = absent()
    """The new fact, for the actions add and update."""
    reward: Number | None = absent()
    """1 if the fact was right in a use, 0 if it was wrong, for the action feedback."""
    similarity: Number | None = absent()
    """Similarity of the prompt to the fact, from 0 to 1, for the action feedback."""

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        needed = {ADD: ("fact", "source"), UPDATE: ("fact",), REMOVE: ()}.get(self.action, ("reward", "similarity"))
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing")
        return self


@dataclass(frozen=True)
class Log:
    """The lines of a log, oldest first."""

    lines: Sequence[MemoryChange]
    label: str = LOG

    @property
    def version(self) -> int:
        """The newest version; 0 for an empty log."""
        return self.lines[-1].version if self.lines else 0

    def at(self, version: int | None = None) -> dict[str, Alive]:
        """Return the facts at a version.

        Args:
            version: The version; None takes the newest one.

        Returns:
            Id -> fact, sorted by id.

        Raises:
            WorkbenchError: If there is no such version, or a line changes a fact that is not there.
        """
        requested = self.version if version is None else version
        if not 0 < requested <= self.version:
            raise UsageError(f"{self.label}: no version {requested}; there are 1..{self.version}")
        facts: dict[str, Alive] = {}
        for line in self.lines:
            name, number = line.id, line.version
            if number > requested:
                break
            if line.action != ADD and name not in facts:
                raise WorkbenchError(
                    f"{self.label}: version {number} changes fact '{name}', which no line before adds",
                    "Restore the file, or run the recipe of the memory again.",
                )
            if line.action == ADD:
                facts[name] = Alive(fact_of(line.fact, self.label), number, line.source or ADDED)
            elif line.action == UPDATE:
                facts[name] = Alive(fact_of(line.fact, self.label), number, facts[name].source)
            elif line.action == REMOVE:
                del facts[name]
            else:
                previous = facts[name]
                use = Use(number, float(line.similarity or 0), float(line.reward or 0))
                facts[name] = Alive(previous.fact, previous.stated, previous.source, (*previous.uses, use))
        return dict(sorted(facts.items()))

    def one(self, name: str) -> Alive:
        """Return a fact of the newest version by its id.

        Raises:
            WorkbenchError: If there is no such fact.
        """
        facts = self.at()
        if name not in facts:
            raise WorkbenchError(
                f"no fact '{name}' in this memory. {nearest(name, facts)}", "`workbench memory ls DIR` lists them."
            )
        return facts[name]


def read_log(folder: Path) -> Log:
    """Read the log of a memory directory.

    Raises:
        WorkbenchError: If there is no log, or if a line is invalid.
    """
    path = folder / LOG
    if not path.is_file():
        raise WorkbenchError(
            f"{folder}: not a memory, because it has no {LOG}", "Name a memory directory, or a configuration with a memory."
        )
    hint = "If the last line of the log is incomplete, delete that line."
    changes = []
    for number, line in jsondoc.lines(path, str(path), hint):
        place = f"{path}:{number}"
        changes.append(MemoryChange.of(jsondoc.as_object(line, place), place))
    return Log(changes, str(path))


def lines_of(action: str, facts: Iterable[Fact], source: str, time: str | None) -> list[dict[str, object]]:
    """Return log lines, without the version, for facts that are added or changed."""
    return [
        {"action": action, "id": fact.id, "time": time, "source": source, "fact": {**fact.document(), "id": fact.id}}
        for fact in facts
    ]


def append(folder: Path, version: int, lines: Sequence[Mapping[str, object]]) -> None:
    """Append lines to a log. The file is replaced as a whole, so that no reader and no later command meets half a line."""
    text = "".join(json.dumps({"version": version, **line}, ensure_ascii=False) + "\n" for line in lines)
    path = folder / LOG
    write_bytes(path, (path.read_bytes() if path.is_file() else b"") + text.encode())


class MemoryFact(JsonObject):
    """A fact of a memory."""

    id: str
    """Id of the fact."""
    prompt: str
    """The prompt, with its subject."""
    target: str
    """The answer."""
    version: int
    """Version of the memory at which the fact was last stated."""
    source: str
    """"recipe" or "added"."""
    feedback: int
    """Number of recorded uses."""
    credibility: Number
    """Credibility of the fact, from 0 to 1."""
    used: bool
    """Whether the model uses the fact; a fact with low credibility is not used."""


class MemoryFacts(JsonObject):
    """The facts of a memory."""

    version: int
    """Version of the memory."""
    method: str
    """Memory method."""
    facts: list[MemoryFact]
    """The facts, by id."""

"""Check a router on prompts whose bricks are known: how often it is right, and who is confused with whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError, nearest
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number, absent
from workbench.models.texts import read_prompts
from workbench.route.deciding.fitting import curve_of
from workbench.route.deciding.hidden import token_rows
from workbench.route.deciding.router import BASE
from workbench.route.deciding.samples import COPIES, copy
from workbench.steps.route import Decisions

if TYPE_CHECKING:
    from workbench.route.mixing.live import Routing

_ROW = 'Write {"prompt": "...", "brick": "NAME"} on each line, with null for prompts that no brick is for.'
MOST_WRONG = 10
"""Number of wrong decisions that a check lists for each set."""


@dataclass(frozen=True)
class Asked:
    """A prompt with the brick that should answer it."""

    prompt: str
    brick: str | None


class CheckedSet(JsonObject):
    """Decisions for one set of prompts, as shares from 0 to 1."""

    set: str
    """Name of the set: a file, or a file with the kind of copy: lower, greeting, typos, behind (thanks), language, paragraph (before)."""
    prompts: int
    """Number of prompts."""
    with_brick: int = absent()
    """Number of prompts that a brick is for."""
    right: Number = absent()
    """Share of them that went to their brick, or to one that it is tied with."""
    right_score: Number = absent()
    """Share of them for which this brick has the highest score, before prompts go to the base."""
    to_base: Number = absent()
    """Share of them that went to the base."""
    wrong_brick: Number = absent()
    """Share of them that went to another brick."""
    without_brick: int = absent()
    """Number of prompts that no brick is for."""
    kept_by_base: Number = absent()
    """Share of them that went to the base."""


class CurvePoint(JsonObject):
    """What a threshold costs on the sets as they are, as shares from 0 to 1."""

    threshold: Number
    """The threshold."""
    to_base: Number
    """Share of the prompts that a brick is for which would go to the base."""
    routed: Number
    """Share of the prompts that no brick is for which would go to a brick."""


class WrongDecision(JsonObject):
    """A prompt that went elsewhere."""

    set: str
    """Name of the set."""
    prompt: str
    """The prompt."""
    brick: str | None
    """Brick that is for it; null for the base."""
    chosen: str | None
    """Brick that it went to; null for the base."""
    confidence: Number
    """Confidence of the decision."""


class RouteCheck(JsonObject):
    """A router's decisions on prompts whose bricks are known."""

    method: str
    """Method of the router."""
    bricks: list[str]
    """The bricks."""
    ties: list[list[str]]
    """Groups of bricks that prompts do not tell apart."""
    threshold: Number | None
    """Smallest confidence with which a prompt goes to a brick; null if no prompt goes to the base."""
    sets: list[CheckedSet]
    """One row for each set of prompts."""
    curve: list[CurvePoint]
    """False abstention against false routing; empty if the sets lack prompts with a brick, or prompts without one."""
    confusion: dict[str, dict[str, dict[str, int]]]
    """Set -> brick that a prompt is for, or "base" -> brick that it went to, or "base" -> number of prompts."""
    wrong: list[WrongDecision]
    """Wrong decisions, the most confident ones of each set."""


@dataclass(frozen=True)
class Checked:
    """Decisions of a router for one set of prompts.

    Attributes:
        name: Name of the set.
        asked: The prompts.
        chosen: The brick of each prompt; None for the base.
        scored: The brick with the highest score, whether or not the prompt went to the base.
        confidence: The confidence of each decision.
        ties: Groups of bricks that count as one.
    """

    name: str
    asked: Sequence[Asked]
    chosen: Sequence[str | None]
    scored: Sequence[str]
    confidence: Sequence[float]
    ties: Sequence[Sequence[str]] = field(default=())

    def summary(self) -> CheckedSet:
        """Return shares: right, wrong brick, to the base; and the right highest scores of prompts with a brick."""
        inside = [i for i, asked in enumerate(self.asked) if asked.brick is not None]
        outside = [i for i, asked in enumerate(self.asked) if asked.brick is None]
        right = sum(self._alike(self.chosen[i], self.asked[i].brick) for i in inside)
        scored = sum(self._alike(self.scored[i], self.asked[i].brick) for i in inside)
        to_base = sum(self.chosen[i] is None for i in inside)
        row = CheckedSet(set=self.name, prompts=len(self.asked))
        if inside:
            row = row.model_copy(
                update={
                    "with_brick": len(inside),
                    "right": right / len(inside),
                    "right_score": scored / len(inside),
                    "to_base": to_base / len(inside),
                    "wrong_brick": (len(inside) - right - to_base) / len(inside),
                }
            )
        if outside:
            of_base = sum(self.chosen[i] is None for i in outside) / len(outside)
            row = row.model_copy(update={"without_brick": len(outside), "kept_by_base": of_base})
        return row

    def confusion(self, bricks: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return wanted brick (or "base") -> chosen brick (or "base") -> number of prompts, without zeros."""
        counts = Counter((asked.brick or BASE, chosen or BASE) for asked, chosen in zip(self.asked, self.chosen, strict=True))
        names = [*bricks, BASE]
        table = {wanted: {name: counts[wanted, name] for name in names if counts[wanted, name]} for wanted in names}
        return {wanted: row for wanted, row in table.items() if row}

    def wrong(self) -> list[WrongDecision]:
        """Return the wrong decisions, the most confident ones first."""
        places = [i for i, asked in enumerate(self.asked) if not self._alike(self.chosen[i], asked.brick)]
        return [
            WrongDecision(
                set=self.name,
                prompt=self.asked[i].prompt,
                brick=self.asked[i].brick,
                chosen=self.chosen[i],
                confidence=round(self.confidence[i], 4),
            )
            for i in sorted(places, key=lambda i: -self.confidence[i])[:MOST_WRONG]
        ]

    def _alike(self, chosen: str | None, wanted: str | None) -> bool:
        return chosen == wanted or any(chosen in group and wanted in group for group in self.ties)


def read_asked(path: Path, label: str, bricks: Sequence[str] | None = None) -> list[Asked]:
    """Read a jsonl file of `{"prompt", "brick"}`; other fields are ignored.

    Args:
        path: The file.
        label: The file's name in messages.
        bricks: The router's bricks; None accepts any name.

    Raises:
        WorkbenchError: If the file is missing or invalid, or names an unknown brick.
    """
    read_prompts(path, label)  # errors in a prompt
    found = []
    for number, line in enumerate(jsondoc.text_of(path, label).split("\n"), 1):
        if not line.strip():
            continue
        row = jsondoc.parse(line, f"{label}:{number}", _ROW)
        brick = row.get("brick", "")
        if brick is not None and bricks is not None and brick not in bricks:
            text = f"{label}:{number}: expected the name of a brick or null in 'brick', found {brick!r}. "
            raise WorkbenchError(text + nearest(str(brick), bricks), _ROW)
        found.append(Asked(row.get("prompt") or row["text"], brick))
    return found


def check(routing: Routing, tokenizer: Any, name: str, asked: Sequence[Asked]) -> Checked:
    """Return the router's decisions for a set of prompts."""
    rows = token_rows(tokenizer, [one.prompt for one in asked])
    return judged(name, asked, routing.decide(rows), routing.bricks, [list(group) for group in routing.ties])


def check_sets(routing: Routing, tokenizer: Any, sets: Mapping[str, Sequence[Asked]], copies: bool = True) -> RouteCheck:
    """Return the router's decisions on sets of prompts."""
    if routing.by_token:
        raise WorkbenchError(
            "this configuration chooses no brick for a prompt: the role of each token decides",
            "`workbench route explain DIR TEXT` shows the roles of a text's tokens.",
        )
    found = []
    for name, asked in sets.items():
        named = {name: asked}
        if copies:
            for kind in COPIES[1:]:
                named[f"{name}, {kind}"] = [Asked(copy(one.prompt, kind, i), one.brick) for i, one in enumerate(asked)]
        found += [check(routing, tokenizer, label, part) for label, part in named.items()]
    plain = [checked for checked in found if checked.name in sets]
    return RouteCheck(
        method=routing.router.method,
        bricks=list(routing.bricks),
        ties=[list(group) for group in routing.ties],
        threshold=routing.router.threshold,
        sets=[checked.summary() for checked in found],
        curve=_curve(plain),
        confusion={checked.name: checked.confusion(routing.bricks) for checked in plain},
        wrong=[row for checked in found for row in checked.wrong()],
    )


def judged(
    name: str, asked: Sequence[Asked], decisions: Decisions, bricks: Sequence[str], ties: Sequence[Sequence[str]]
) -> Checked:
    """Return decisions beside the bricks that were wanted."""
    chosen = [bricks[int(row.argmax())] if bool(row.any()) else None for row in decisions.weights]
    scored = [bricks[int(row.argmax())] for row in decisions.scores]
    return Checked(name, asked, chosen, scored, decisions.confidence.tolist(), ties)


def _curve(found: Sequence[Checked]) -> list[CurvePoint]:
    """Return what other thresholds cost on sets of prompts; empty without prompts of bricks or without prompts that no brick is for."""
    pairs = [pair for checked in found for pair in zip(checked.asked, checked.confidence, strict=True)]
    inside, outside = ([value for asked, value in pairs if (asked.brick is None) is none] for none in (False, True))
    costs = curve_of(torch.tensor(inside, dtype=torch.float64), torch.tensor(outside, dtype=torch.float64))
    return [CurvePoint(**cost) for cost in costs]

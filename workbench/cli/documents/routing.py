"""Documents of `route`."""

from __future__ import annotations

from workbench.bricks.card import RoutingStatistics
from workbench.cli.documents.document import Document, optional
from workbench.results import Number


class RoutedToken(Document):
    """The decision at one token, if the text ended there."""

    token: str
    """Text of the token."""
    chosen: str | None
    """Brick with the largest weight; null for the base."""
    best: str
    """Brick with the highest score, also where the prompt goes to the base."""
    score: Number
    """The highest score."""
    confidence: Number
    """Confidence of the decision; below the threshold, the base answers."""
    role: str | None = optional()
    """With `route: roles`: brick whose role the token has; null for text."""
    weights: dict[str, Number] = optional()
    """With `route: roles`: brick that acts on the token -> its weight."""


class ExplainDocument(Document):
    """What a router does with a text."""

    text: str
    """The text, without the chat template."""
    method: str
    """Method of the router."""
    chosen: dict[str, Number]
    """Brick that acts -> its weight; empty for the base. With `route: roles`: the bricks that act on text."""
    scores: dict[str, Number]
    """Brick -> its score. Tied bricks have one common score. With `route: roles`: the mean of its weights over the tokens."""
    confidence: Number
    """Confidence of the decision."""
    threshold: Number | None
    """Smallest confidence with which a prompt goes to a brick; null if no prompt goes to the base."""
    ties: list[list[str]]
    """Groups of bricks that prompts do not tell apart. The first of a group acts."""
    layer: int | None
    """Number of decoder blocks whose output is pooled; null for routers that read no hidden states."""
    window: int
    """Number of last tokens that are pooled."""
    tokens: list[RoutedToken]
    """The decision at each token of the text; empty for routers that see whole prompts only."""


class MeasuredBrick(RoutingStatistics, Document):
    """Routing statistics of a brick, as on its card."""

    brick: str
    """Name of the brick."""


class CheckedSet(Document):
    """Decisions for one set of prompts, as shares from 0 to 1."""

    set: str
    """Name of the set: a file, or a file with the kind of copy: lower, greeting, typos, behind (thanks), language, paragraph (before)."""
    prompts: int
    """Number of prompts."""
    with_brick: int = optional()
    """Number of prompts that a brick is for."""
    right: Number = optional()
    """Share of them that went to their brick, or to one that it is tied with."""
    right_score: Number = optional()
    """Share of them for which this brick has the highest score, before prompts go to the base."""
    to_base: Number = optional()
    """Share of them that went to the base."""
    wrong_brick: Number = optional()
    """Share of them that went to another brick."""
    without_brick: int = optional()
    """Number of prompts that no brick is for."""
    kept_by_base: Number = optional()
    """Share of them that went to the base."""


class CurvePoint(Document):
    """What a threshold costs on the sets as they are, as shares from 0 to 1."""

    threshold: Number
    """The threshold."""
    to_base: Number
    """Share of the prompts that a brick is for which would go to the base."""
    routed: Number
    """Share of the prompts that no brick is for which would go to a brick."""


class WrongDecision(Document):
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


class RouteCheckDocument(Document):
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

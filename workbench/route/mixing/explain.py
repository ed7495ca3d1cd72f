"""What a routed model does with a text: which bricks it chooses, and why, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.ground.results import JsonObject, Number, absent
from workbench.models.prompts import encode_text
from workbench.route.deciding.hidden import hidden_states, moving
from workbench.steps.route import Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.route.mixing.live import Routing


class RoutedToken(JsonObject):
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
    role: str | None = Field(default="", exclude_if=lambda role: role == "")
    """With `route: roles`: brick whose role the token has; null for text."""
    weights: dict[str, Number] = absent()
    """With `route: roles`: brick that acts on the token -> its weight."""


class Explanation(JsonObject):
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

    @property
    def by_role(self) -> bool:
        """True if the roles of tokens decide, and not the prompt."""
        return any(token.weights is not None for token in self.tokens)


@no_grad
def explain(routing: Routing, model: Any, tokenizer: Any, text: str) -> Explanation:
    """Return what a router does with a text.

    Args:
        routing: The routing of the live model.
        model: The live model.
        tokenizer: Its tokenizer.
        text: A prompt, with or without the chat template.

    Raises:
        WorkbenchError: If the text is empty.
    """
    if not text.strip():
        raise WorkbenchError("expected a text to explain, found an empty one", 'workbench route explain DIR "Please add 2 and 3"')
    if routing.by_token:
        return _explain_roles(routing, tokenizer, text)
    whole = routing.frame.message(text)
    row = encode_text(tokenizer, whole)
    decisions = routing.decide([encode_text(tokenizer, text)])  # with the messages before
    router, bricks = routing.router, routing.bricks
    return Explanation(
        text=whole,
        method=router.method,
        chosen=_weights(decisions.weights[0], bricks),
        scores={name: round(float(score), 4) for name, score in zip(bricks, decisions.scores[0], strict=True)},
        confidence=round(float(decisions.confidence[0]), 4),
        threshold=router.threshold,
        ties=[list(group) for group in routing.ties],
        layer=router.layer,
        window=router.window,
        tokens=_by_token(routing, model, tokenizer, row),
    )


def _explain_roles(routing: Routing, tokenizer: Any, text: str) -> Explanation:
    """Return which bricks act on each token of a text; `scores` are the bricks' mean weights over the tokens.

    The whole text counts, with the template and special tokens, because they can have roles.
    """
    row = tokenizer(text)["input_ids"]
    router: Any = routing.router
    ids = torch.tensor([row])
    (weights,), (roles,) = router.token_weights(ids), router.roles_of(ids).tolist()
    starts = [str(tokenizer.decode(row[: i + 1])) for i in range(len(row))]
    tokens = [
        RoutedToken(
            token=_piece(starts[i - 1] if i else "", starts[i]),
            chosen=next(iter(sorted(acting, key=lambda name: -abs(acting[name]))), None),
            best=routing.bricks[int(weights[i].abs().argmax())],
            score=round(float(weights[i].abs().max()), 4),
            confidence=1.0,
            role=router.roles[roles[i] - 1].brick if roles[i] else None,
            weights=acting,
        )
        for i in range(len(row))
        for acting in [_weights(weights[i], routing.bricks)]
    ]
    return Explanation(
        text=text,
        method=router.method,
        chosen=_weights(router.weights[0], routing.bricks),
        scores={name: round(float(mean), 4) for name, mean in zip(routing.bricks, weights.mean(0), strict=True)},
        confidence=1.0,
        threshold=None,
        ties=[],
        layer=None,
        window=router.window,
        tokens=tokens,
    )


def _weights(weights: Tensor, bricks: Sequence[str]) -> dict[str, float]:
    """Return the bricks that act, with their weights."""
    return {name: round(float(weight), 4) for name, weight in zip(bricks, weights, strict=True) if float(weight)}


def _by_token(routing: Routing, model: Any, tokenizer: Any, row: Sequence[int]) -> list[RoutedToken]:
    """Return the decision at each token, if the router reads hidden states or texts."""
    router = routing.router
    starts = [str(tokenizer.decode(row[: i + 1], skip_special_tokens=True)) for i in range(len(row))]
    if router.layer is not None:
        with routing.fixed(None):
            (states,) = hidden_states(model, [row], router.layer)
        decisions = router.decide(Prompts(starts, moving(states, router.window)))
    elif router.method == "text":
        decisions = router.decide(Prompts(starts))
    else:
        return []
    return [
        RoutedToken(
            token=_piece(starts[i - 1] if i else "", starts[i]),
            chosen=next(iter(_weights(decisions.weights[i], routing.bricks)), None),
            best=routing.bricks[int(decisions.scores[i].argmax())],
            score=round(float(decisions.scores[i].max()), 4),
            confidence=round(float(decisions.confidence[i]), 4),
        )
        for i in range(len(row))
    ]


def _piece(before: str, text: str) -> str:
    """Return what a token adds to a text, with the space before a word, which a decoded token alone may lack."""
    return text[len(before) :] if text.startswith(before) else ""

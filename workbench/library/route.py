"""What a routed model does with prompts: which bricks it chooses, token by token, and how often it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.errors import WorkbenchError, nearest
from workbench.lazy import no_grad, torch
from workbench.models.prompts import encode_text
from workbench.models.texts import read_prompts
from workbench.route.deciding.copies import COPIES, copy
from workbench.route.deciding.fitting import curve_of
from workbench.route.features.hidden import hidden_states, moving, token_rows
from workbench.steps.route import Decisions, Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.route.mixing.live import Routing

_ROW = 'Write {"prompt": "...", "brick": "NAME"} on each line, with null for prompts that no brick is for.'
MOST_WRONG = 10
"""Number of wrong decisions that a check lists for each set."""


@dataclass(frozen=True)
class Asked:
    """A prompt with the brick that should answer it.

    Attributes:
        prompt: The prompt.
        brick: The brick; None for the base.
    """

    prompt: str
    brick: str | None


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

    def summary(self) -> dict[str, Any]:
        """Return shares as plain data: right, wrong brick, to the base; and the right highest scores of prompts with a brick."""
        inside = [i for i, asked in enumerate(self.asked) if asked.brick is not None]
        outside = [i for i, asked in enumerate(self.asked) if asked.brick is None]
        right = [i for i in inside if self._alike(self.chosen[i], self.asked[i].brick)]
        scored = [i for i in inside if self._alike(self.scored[i], self.asked[i].brick)]
        abstained = [i for i in inside if self.chosen[i] is None]
        kept = [i for i in outside if self.chosen[i] is None]
        row: dict[str, Any] = {"set": self.name, "prompts": len(self.asked)}
        if inside:
            row |= {
                "with_brick": len(inside),
                "right": len(right) / len(inside),
                "right_score": len(scored) / len(inside),
                "to_base": len(abstained) / len(inside),
                "wrong_brick": (len(inside) - len(right) - len(abstained)) / len(inside),
            }
        if outside:
            row |= {"without_brick": len(outside), "kept_by_base": len(kept) / len(outside)}
        return row

    def confusion(self, bricks: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return wanted brick (or "base") -> chosen brick (or "base") -> number of prompts, without zeros."""
        table: dict[str, dict[str, int]] = {}
        for asked, chosen in zip(self.asked, self.chosen, strict=True):
            row = table.setdefault(asked.brick or "base", {})
            row[chosen or "base"] = row.get(chosen or "base", 0) + 1
        order = {name: i for i, name in enumerate([*bricks, "base"])}
        return {
            wanted: dict(sorted(row.items(), key=lambda item: order[item[0]]))
            for wanted, row in sorted(table.items(), key=lambda item: order[item[0]])
        }

    def wrong(self) -> list[dict[str, Any]]:
        """Return the wrong decisions, the most confident ones first."""
        places = [i for i, asked in enumerate(self.asked) if not self._alike(self.chosen[i], asked.brick)]
        return [
            {
                "prompt": self.asked[i].prompt,
                "brick": self.asked[i].brick,
                "chosen": self.chosen[i],
                "confidence": round(self.confidence[i], 4),
            }
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
    """Return the router's decisions for a set of prompts.

    Args:
        routing: The routing of a live model.
        tokenizer: The model's tokenizer.
        name: Name of the set.
        asked: The prompts.
    """
    rows = token_rows(tokenizer, [one.prompt for one in asked])
    return judged(name, asked, routing.decide(rows), routing.bricks, _ties(routing))


def check_sets(routing: Routing, tokenizer: Any, sets: Mapping[str, Sequence[Asked]], copies: bool = True) -> dict[str, Any]:
    """Return the router's decisions on sets of prompts, as plain data.

    Args:
        routing: The routing of a live model.
        tokenizer: The model's tokenizer.
        sets: Name -> prompts.
        copies: Also check each set in every kind of copy.
    """
    if routing.by_token:
        raise WorkbenchError(
            "this configuration chooses no brick for a prompt: the role of each token decides",
            "`workbench route explain DIR TEXT` shows the roles of a text's tokens.",
        )
    found = []
    for name, asked in sets.items():
        named = {name: asked}
        if copies:
            named |= {f"{name}, {kind}": part for kind, part in variants(asked).items()}
        found += [check(routing, tokenizer, label, part) for label, part in named.items()]
    return {
        "method": routing.router.method,
        "bricks": list(routing.bricks),
        "ties": _ties(routing),
        "threshold": routing.router.threshold,
        "sets": [checked.summary() for checked in found],
        "curve": _curve([checked for checked in found if checked.name in sets]),
        "confusion": {checked.name: checked.confusion(routing.bricks) for checked in found if checked.name in sets},
        "wrong": [{"set": checked.name, **row} for checked in found for row in checked.wrong()],
    }


def variants(asked: Sequence[Asked]) -> dict[str, list[Asked]]:
    """Return the prompts by kind of copy."""
    return {kind: [Asked(copy(one.prompt, kind, i), one.brick) for i, one in enumerate(asked)] for kind in COPIES[1:]}


def judged(
    name: str, asked: Sequence[Asked], decisions: Decisions, bricks: Sequence[str], ties: Sequence[Sequence[str]]
) -> Checked:
    """Return decisions beside the bricks that were wanted.

    Args:
        name: Name of the set.
        asked: The prompts.
        decisions: What the router decided for them.
        bricks: The router's bricks.
        ties: Groups of bricks that count as one.
    """
    chosen = [bricks[int(row.argmax())] if bool(row.any()) else None for row in decisions.weights]
    scored = [bricks[int(row.argmax())] for row in decisions.scores]
    return Checked(name, asked, chosen, scored, decisions.confidence.tolist(), ties)


def _curve(found: Sequence[Checked]) -> list[dict[str, float]]:
    """Return what other thresholds cost on sets of prompts; empty without prompts of bricks or without prompts that no brick is for."""
    pairs = [pair for checked in found for pair in zip(checked.asked, checked.confidence, strict=True)]
    inside, outside = ([value for asked, value in pairs if (asked.brick is None) is none] for none in (False, True))
    return curve_of(torch.tensor(inside, dtype=torch.float64), torch.tensor(outside, dtype=torch.float64))


def _ties(routing: Routing) -> list[list[str]]:
    """Return the router's ties."""
    return [list(group) for group in routing.router.settings().get("ties", ())]


@no_grad
def explain(routing: Routing, model: Any, tokenizer: Any, text: str) -> dict[str, Any]:
    """Return what a router does with a text, as plain data.

    Args:
        routing: The routing of the live model.
        model: The live model.
        tokenizer: Its tokenizer.
        text: A prompt, with or without the chat template.

    Returns:
        `chosen` (bricks with their weights; empty for the base), `scores` by brick, `confidence`, `threshold`, `ties`, and `tokens`:
        for each token of the text, the decision if the text ended there. `tokens` is empty for routers that only see whole prompts.

    Raises:
        WorkbenchError: If the text is empty.
    """
    if not text.strip():
        raise WorkbenchError("expected a text to explain, found an empty one", 'workbench route explain DIR "Please add 2 and 3"')
    if routing.by_token:
        return _explain_roles(routing, tokenizer, text)
    whole = routing.frame.message(text)
    row = encode_text(tokenizer, whole)
    decisions = routing.decide([row])
    router, bricks = routing.router, routing.bricks
    settings = router.settings()
    return {
        "text": whole,
        "method": router.method,
        "chosen": _weights(decisions.weights[0], bricks),
        "scores": {name: round(float(score), 4) for name, score in zip(bricks, decisions.scores[0], strict=True)},
        "confidence": round(float(decisions.confidence[0]), 4),
        "threshold": router.threshold,
        "ties": settings.get("ties", []),
        "layer": router.layer,
        "window": router.window,
        "tokens": _by_token(routing, model, tokenizer, row),
    }


def _explain_roles(routing: Routing, tokenizer: Any, text: str) -> dict[str, Any]:
    """Return which bricks act on each token of a text, as plain data; `scores` are the bricks' mean weights over the tokens.

    The whole text counts, with the template and special tokens, because they can have roles.
    """
    row = tokenizer(text)["input_ids"]
    router: Any = routing.router
    ids = torch.tensor([row])
    (weights,), (roles,) = router.token_weights(ids), router.roles_of(ids).tolist()
    starts = [str(tokenizer.decode(row[: i + 1])) for i in range(len(row))]
    tokens = [
        {
            "token": _piece(starts[i - 1] if i else "", starts[i]),
            "chosen": next(iter(sorted(acting, key=lambda name: -abs(acting[name]))), None),
            "best": routing.bricks[int(weights[i].abs().argmax())],
            "score": round(float(weights[i].abs().max()), 4),
            "confidence": 1.0,
            "role": router.roles[roles[i] - 1].brick if roles[i] else None,
            "weights": acting,
        }
        for i in range(len(row))
        for acting in [_weights(weights[i], routing.bricks)]
    ]
    return {
        "text": text,
        "method": router.method,
        "chosen": _weights(router.weights[0], routing.bricks),
        "scores": {name: round(float(mean), 4) for name, mean in zip(routing.bricks, weights.mean(0), strict=True)},
        "confidence": 1.0,
        "threshold": None,
        "ties": [],
        "layer": None,
        "window": router.window,
        "tokens": tokens,
    }


def _weights(weights: Tensor, bricks: Sequence[str]) -> dict[str, float]:
    """Return the bricks that act, with their weights."""
    return {name: round(float(weight), 4) for name, weight in zip(bricks, weights, strict=True) if float(weight)}


def _by_token(routing: Routing, model: Any, tokenizer: Any, row: Sequence[int]) -> list[dict[str, Any]]:
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
        {
            "token": _piece(starts[i - 1] if i else "", starts[i]),
            "chosen": next(iter(_weights(decisions.weights[i], routing.bricks)), None),
            "best": routing.bricks[int(decisions.scores[i].argmax())],
            "score": round(float(decisions.scores[i].max()), 4),
            "confidence": round(float(decisions.confidence[i]), 4),
        }
        for i in range(len(row))
    ]


def _piece(before: str, text: str) -> str:
    """Return what a token adds to a text, with the space before a word, which a decoded token alone may lack."""
    return text[len(before) :] if text.startswith(before) else ""

"""The page of `route explain`: scores of the bricks, and the choice at each token in colors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workbench.ground.numbers import fixed
from workbench.report.page import filled

if TYPE_CHECKING:
    from workbench.route.mixing.explain import Explanation

# Red, green and blue of the bricks in order, readable on light and on dark paper; more bricks use them again.
_COLORS = ("0 114 178", "213 94 0", "0 158 115", "204 121 167", "230 159 0", "86 180 233", "140 86 75", "120 94 240")
_WIDEST = 240  # pixels of the largest score's bar


def explain_page(found: Explanation, bricks: Sequence[str]) -> str:
    """Return a self-contained page that makes no request.

    Args:
        found: What the router does with a text.
        bricks: The router's bricks, in order.
    """
    roles = found.by_role
    numbers = {name: i % len(_COLORS) for i, name in enumerate(bricks)}
    scores = sorted(found.scores.items(), key=lambda item: -item[1])
    largest = max((abs(score) for _, score in scores), default=0.0) or 1.0
    tied = {name: group for group in found.ties for name in group}
    rows = [
        {
            "name": name,
            "score": fixed(score, 4),
            "width": round(_WIDEST * max(0.0, score) / largest),
            "note": "" if roles else _note(name, found.chosen, tied),
        }
        for name, score in scores
    ]
    none = "text" if roles else "base"
    names = [token.role if roles else token.chosen for token in found.tokens]
    tokens = [
        {
            "text": token.token,
            "number": numbers.get(name or ""),
            "tip": _sum(token.weights)
            if roles
            else f"{name or none}; best {token.best} {token.score:.3f}, confidence {token.confidence:.3f}",
        }
        for token, name in zip(found.tokens, names, strict=True)
    ]
    used = list(dict.fromkeys(names))
    context = {
        "title": ", ".join(name or none for name in used) if roles else ", ".join(found.chosen) or "base",
        "method": found.method,
        "roles": roles,
        "lead": f"Each brick acts on the tokens of its role. On text acts: {_sum(found.chosen)}." if roles else _lead(found),
        "rows": rows,
        "tokens": tokens,
        "legend": [(name or none, numbers.get(name or "")) for name in used],
        "colors": _COLORS,
    }
    return filled("routing.html.j2", context, (), ("report.css",))


def _sum(weights: Mapping[str, float]) -> str:
    """Return weights of bricks as a sum: "0.5 one + 0.25 three", or "the base alone"."""
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items()) or "the base alone"


def _lead(found: Explanation) -> str:
    """Return a sentence on the decision."""
    confidence, threshold, names = found.confidence, found.threshold, " and ".join(found.chosen)
    if threshold is None:
        return f"The prompt goes to {names}. This router sends no prompt to the base."
    if names:
        return f"The prompt goes to {names}: its confidence {confidence:.3f} is not below the threshold {threshold:.3f}."
    return f"The base answers: the confidence {confidence:.3f} is below the threshold {threshold:.3f}."


def _note(name: str, chosen: Mapping[str, float], tied: Mapping[str, Sequence[str]]) -> str:
    """Return what is to say about a brick beside its score."""
    parts = [] if name not in chosen else ["acts" if chosen[name] == 1 else f"acts with weight {chosen[name]:.2f}"]
    if name in tied:
        parts.append(f"tied with {', '.join(other for other in tied[name] if other != name)}; {tied[name][0]} acts for both")
    return "; ".join(parts)

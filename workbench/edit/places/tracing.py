"""Where a fact is looked up: what restoring one clean state brings back of an answer that another subject has taken away.

Causal tracing (2202.05262, §2) with another subject's tokens as the corruption, and whole subject spans restored: single tokens of a
subject mislead on models whose layers see few tokens back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.edit.closed_form.bundled import known_facts
from workbench.edit.places.parts import Parts, Stopped, first_of, hooked, shaped, with_first
from workbench.edit.places.passes import logits_at, run
from workbench.edit.places.rows import EditRow, Padded, Position, padded, row_of
from workbench.facts import Fact
from workbench.steps import MethodContext

What = Literal["block", "feed_forward"]
Place = Literal["subject", "subject_last", "last"]
PLACES: tuple[Place, ...] = ("subject", "subject_last", "last")


@dataclass(frozen=True)
class TracedFact:
    """One fact's probabilities of the model's own answer.

    Attributes:
        fact: The fact's id.
        answer: The token that the model gives.
        clean: Its probability.
        corrupted: The same with another subject's tokens.
        restored: Layer -> the same with that layer's states restored at `subject`, `subject_last`, `last`.
    """

    fact: str
    answer: int
    clean: float
    corrupted: float
    restored: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Trace:
    """Shares of an answer's probability that restored states bring back.

    Attributes:
        facts: Number of facts traced.
        clean: Mean probability of the model's own answer.
        corrupted: The same with another subject's tokens.
        recovered: Layer -> share recovered by restoring that layer at `subject`, `subject_last`, `last`.
        rows: What each fact adds to that.
    """

    facts: int
    clean: float
    corrupted: float
    recovered: dict[int, dict[str, float]]
    rows: tuple[TracedFact, ...] = ()

    def position(self, layer: int) -> Position:
        """Where a layer carries a fact: at the subject where that brings back at least as much as the prompt's last token."""
        at = self.recovered[layer]
        return "subject_last" if at["subject"] >= at["last"] else "prompt_last"


def trace(
    context: MethodContext, parts: Parts, facts: Sequence[Fact], layers: Sequence[int], what: What = "block"
) -> Trace | None:
    """Trace facts that have a subject; None where there are none.

    Args:
        context: Model and tokenizer.
        parts: Where the layers are.
        facts: The facts; each one's subject is corrupted with that of the next, a lone one's with one of the bundled facts. The answer
            is the model's own next token.
        layers: Which to restore.
        what: Restore a block's output, or what its feed-forward part gives.
    """
    chosen = [f for f in facts if f.subject is not None]
    rows = [_prompt(row_of(f, context.tokenizer, "subject_last")) for f in chosen]
    others = rows[1:] + rows[:1] if len(rows) > 1 else [row_of(known_facts()[0], context.tokenizer, "subject_last")] * len(rows)
    triples = [(fact, row, _swapped(row, other)) for fact, row, other in zip(chosen, rows, others, strict=True)]
    triples = [(fact, clean, other) for fact, clean, other in triples if clean.tokens != other.tokens]
    if not triples:
        return None
    traced, rows = [fact for fact, _, _ in triples], [row for _, row, _ in triples]
    clean, corrupted = padded(rows, context.device), padded([other for _, _, other in triples], context.device)
    with torch.no_grad():
        before = _next(parts, clean)
        answer = before.argmax(-1)
        high = before.gather(1, answer[:, None])[:, 0]
        low = _next(parts, corrupted).gather(1, answer[:, None])[:, 0]
        states = _states(parts, clean, layers, what)
        restored: dict[int, dict[str, Tensor]] = {}
        for number, layer in enumerate(layers):
            context.progress(number, len(layers), f"trace: {what.replace('_', '-')} {layer}")
            restored[layer] = {}
            for place in PLACES:
                where = _where(rows, place, clean)
                with hooked(_module(parts, layer, what), after=_restorer(states[layer], where, corrupted)):
                    restored[layer][place] = _next(parts, corrupted).gather(1, answer[:, None])[:, 0]
    gap = (high.sum() - low.sum()).clamp(min=1e-9)
    recovered = {
        layer: {place: float((got.sum() - low.sum()) / gap) for place, got in at.items()} for layer, at in restored.items()
    }
    found = tuple(
        TracedFact(
            fact.id, int(answer[i]), float(high[i]), float(low[i]),
            {layer: {place: float(got[i]) for place, got in at.items()} for layer, at in restored.items()})
        for i, fact in enumerate(traced)
    )  # fmt: skip
    return Trace(len(traced), float(high.mean()), float(low.mean()), recovered, found)


def _prompt(row: EditRow) -> EditRow:
    """The prompt alone; its "target" stands for the place behind it."""
    return replace(row, tokens=row.tokens[: row.start + 1], target=row.target[:1])


def _swapped(row: EditRow, other: EditRow) -> EditRow:
    """The prompt with as many tokens of another subject, from its end backwards, repeated where it is shorter."""
    start, stop = row.span
    subject = other.tokens[other.span[0] : other.span[1]]
    length = stop - start
    taken = (subject * (length // len(subject) + 1))[-length:]
    return replace(row, tokens=(*row.tokens[:start], *taken, *row.tokens[stop:]))


def _next(parts: Parts, batch: Padded) -> Tensor:
    """Probabilities of the next token [row, vocabulary]."""
    with logits_at(parts, batch.places):
        found: Tensor = run(parts, batch).logits[0].float().softmax(-1)
    return found


def _module(parts: Parts, layer: int, what: What) -> Any:
    return parts.layers[layer] if what == "block" else parts.out(layer)


def _states(parts: Parts, batch: Padded, layers: Sequence[int], what: What) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def see(_module: Any, _args: Any, output: Any) -> None:
            found[layer] = shaped(first_of(output), *batch.tokens.shape).clone()
            if layer == max(layers):
                raise Stopped

        return see

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hooked(_module(parts, layer, what), after=keep(layer)))
        run(parts, batch)
    return found


def _where(rows: Sequence[EditRow], place: str, batch: Padded) -> Tensor:
    """[row, position], true where a state is restored."""
    mask = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start, stop = {"subject": row.span, "subject_last": (row.span[1] - 1, row.span[1]), "last": (row.start, row.start + 1)}[
            place
        ]
        mask[i, start:stop] = True
    return mask.to(batch.tokens.device)


def _restorer(state: Tensor, where: Tensor, batch: Padded) -> Any:
    def restore(_module: Any, _args: Any, output: Any) -> Any:
        hidden = first_of(output)
        mixed = torch.where(where[..., None], state, shaped(hidden, *batch.tokens.shape))
        return with_first(output, mixed.reshape(hidden.shape))

    return restore

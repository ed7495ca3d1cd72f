"""Causal tracing: find the layers and tokens at which a model looks a fact up.

The subject's tokens are replaced by those of another subject, and the clean states of single layers are restored; the share of
the answer's probability that returns tells where the fact is carried (Meng et al. 2022, arXiv 2202.05262, section 2). Whole
subjects are restored, because single tokens of a subject mislead on models whose layers attend to few earlier tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from workbench.edit.closed_form.bundled import known_facts
from workbench.edit.places.parts import Parts, Stopped, first_of, hooked, shaped, with_first
from workbench.edit.places.passes import logits_at, run
from workbench.edit.places.rows import EditRow, Padded, Position, padded, row_of
from workbench.facts import Fact
from workbench.lazy import torch
from workbench.steps import MethodContext

if TYPE_CHECKING:
    from torch import Tensor

What = Literal["block", "feed_forward"]
Place = Literal["subject", "subject_last", "last"]
PLACES: tuple[Place, ...] = ("subject", "subject_last", "last")


@dataclass(frozen=True)
class TracedFact:
    """Probabilities of the model's own answer to the prompt of one fact.

    Attributes:
        fact: ID of the fact.
        answer: Token that the model predicts.
        clean: Probability of the answer.
        corrupted: Probability of the answer with another subject's tokens.
        restored: Layer -> probability with that layer's states restored at `subject`, `subject_last` and `last`.
    """

    fact: str
    answer: int
    clean: float
    corrupted: float
    restored: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Trace:
    """Shares of the answers' probability that restored states recover.

    Attributes:
        facts: Number of facts traced.
        clean: Mean probability of the model's own answers.
        corrupted: Mean probability with other subjects' tokens.
        recovered: Layer -> share recovered by restoring that layer at `subject`, `subject_last` and `last`.
        rows: Probabilities of the single facts.
    """

    facts: int
    clean: float
    corrupted: float
    recovered: dict[int, dict[str, float]]
    rows: tuple[TracedFact, ...] = ()

    def position(self, layer: int) -> Position:
        """Return the token where a layer carries facts: the subject's, if it recovers no less than the prompt's last token."""
        at = self.recovered[layer]
        return "subject_last" if at["subject"] >= at["last"] else "prompt_last"


def trace(
    context: MethodContext, parts: Parts, facts: Sequence[Fact], layers: Sequence[int], what: What = "block"
) -> Trace | None:
    """Trace facts that have a subject.

    Args:
        context: Model and tokenizer.
        parts: Parts of the model.
        facts: The facts. Each subject is replaced by that of the next fact, or of a bundled fact if there is only one. The answer
            is the model's own next token.
        layers: Layers to restore.
        what: Restore the output of a block, or of its feed-forward part.

    Returns:
        The shares recovered; None if no fact can be traced.
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
    fact_rows = tuple(
        TracedFact(
            fact.id,
            int(answer[i]),
            float(high[i]),
            float(low[i]),
            {layer: {place: float(got[i]) for place, got in at.items()} for layer, at in restored.items()},
        )
        for i, fact in enumerate(traced)
    )
    return Trace(len(traced), float(high.mean()), float(low.mean()), recovered, fact_rows)


def _prompt(row: EditRow) -> EditRow:
    """Return the prompt alone; its `target` marks the position after it."""
    return replace(row, tokens=row.tokens[: row.start + 1], target=row.target[:1])


def _swapped(row: EditRow, other: EditRow) -> EditRow:
    """Replace the subject's tokens with as many of another subject, taken from its end and repeated if it is shorter."""
    start, stop = row.span
    subject = other.tokens[other.span[0] : other.span[1]]
    length = stop - start
    taken = (subject * (length // len(subject) + 1))[-length:]
    return replace(row, tokens=(*row.tokens[:start], *taken, *row.tokens[stop:]))


def _next(parts: Parts, batch: Padded) -> Tensor:
    """Return the probabilities of the next token [row, vocabulary]."""
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
    """Return a mask [row, position] of the states to restore."""
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

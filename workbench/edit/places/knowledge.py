"""What a live model knows: where it looks facts up (causal tracing), and whether its greedy answer to a prompt is the target.

In a trace, the subject's tokens are replaced by those of another subject, and the clean states of single layers are restored; the share
of the answer's probability that returns tells where the fact is carried (Meng et al. 2022, arXiv 2202.05262, section 2). Whole
subjects are restored, because single tokens of a subject mislead on models whose layers attend to few earlier tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from workbench.edit.inputs import known_facts
from workbench.edit.places.parts import EditRow, Padded, Parts, Position, padded, row_of
from workbench.edit.places.passes import logits_at, run, target_log_probabilities
from workbench.facts.facts import Fact
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import Stopped, first_of, head_sees, hooked, shaped, with_first
from workbench.steps import MethodContext

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


What = Literal["block", "feed_forward"]
Place = Literal["subject", "subject_last", "last"]
PLACES: tuple[Place, ...] = ("subject", "subject_last", "last")


@dataclass(frozen=True)
class TracedAnswer:
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
    rows: tuple[TracedAnswer, ...] = ()

    def position(self, layer: int) -> Position:
        """Return the token where a layer carries facts: the subject's, if it recovers no less than the prompt's last token."""
        shares = self.recovered[layer]
        return "subject_last" if shares["subject"] >= shares["last"] else "prompt_last"


def trace(
    context: MethodContext, parts: Parts, facts: Sequence[Fact], layers: Sequence[int], part: What = "block"
) -> Trace | None:
    """Trace facts that have a subject.

    Args:
        context: Model and tokenizer.
        parts: Parts of the model.
        facts: The facts. Each subject is replaced by that of the next fact, or of a bundled fact if there is only one. The answer
            is the model's own next token.
        layers: Layers to restore.
        part: Restore the output of a block, or of its feed-forward part.

    Returns:
        The shares recovered; None if no fact can be traced.
    """
    chosen = [f for f in facts if f.subject is not None]
    rows = [row_of(f, context.tokenizer, "subject_last").prompt for f in chosen]
    # Each row's subject is replaced by that of the next row.
    donors = rows[1:] + rows[:1] if len(rows) > 1 else [row_of(known_facts()[0], context.tokenizer, "subject_last")] * len(rows)
    triples = [(fact, row, _with_subject_of(row, donor)) for fact, row, donor in zip(chosen, rows, donors, strict=True)]
    triples = [(fact, row, swapped) for fact, row, swapped in triples if row.tokens != swapped.tokens]
    if not triples:
        return None
    traced, rows = [fact for fact, _, _ in triples], [row for _, row, _ in triples]
    clean, corrupted = padded(rows, context.device), padded([swapped for _, _, swapped in triples], context.device)
    with torch.no_grad():
        clean_probabilities = _next_token(parts, clean)
        answer = clean_probabilities.argmax(-1)
        clean_probability = clean_probabilities.gather(1, answer[:, None])[:, 0]
        corrupted_probability = _next_token(parts, corrupted).gather(1, answer[:, None])[:, 0]
        states = _states(parts, clean, layers, part)
        restored: dict[int, dict[str, Tensor]] = {}
        for number, layer in enumerate(layers):
            context.progress(number, len(layers), f"trace: {part.replace('_', '-')} {layer}")
            restored[layer] = {}
            for place in PLACES:
                mask = _restored_positions(rows, place, clean)
                with hooked(_module(parts, layer, part), after=_restorer(states[layer], mask, corrupted)):
                    restored[layer][place] = _next_token(parts, corrupted).gather(1, answer[:, None])[:, 0]
    gap = (clean_probability.sum() - corrupted_probability.sum()).clamp(min=1e-9)
    recovered = {
        layer: {place: float((probability.sum() - corrupted_probability.sum()) / gap) for place, probability in by_place.items()}
        for layer, by_place in restored.items()
    }
    fact_rows = tuple(
        TracedAnswer(
            fact.id,
            int(answer[i]),
            float(clean_probability[i]),
            float(corrupted_probability[i]),
            {
                layer: {place: float(probability[i]) for place, probability in by_place.items()}
                for layer, by_place in restored.items()
            },
        )
        for i, fact in enumerate(traced)
    )
    return Trace(len(traced), float(clean_probability.mean()), float(corrupted_probability.mean()), recovered, fact_rows)


def _with_subject_of(row: EditRow, donor: EditRow) -> EditRow:
    """Replace the subject's tokens with as many of another subject, taken from its end and repeated if it is shorter."""
    start, stop = row.span
    donor_subject = donor.tokens[donor.span[0] : donor.span[1]]
    length = stop - start
    replacement = (donor_subject * (length // len(donor_subject) + 1))[-length:]
    return replace(row, tokens=(*row.tokens[:start], *replacement, *row.tokens[stop:]))


def _next_token(parts: Parts, batch: Padded) -> Tensor:
    """Return the probabilities of the next token [row, vocabulary]."""
    with logits_at(parts, batch.places):
        probabilities: Tensor = run(parts, batch).logits[0].float().softmax(-1)
    return probabilities


def _module(parts: Parts, layer: int, part: What) -> Any:
    """Return the module whose output is restored."""
    return parts.layers[layer] if part == "block" else parts.out(layer)


def _states(parts: Parts, batch: Padded, layers: Sequence[int], part: What) -> dict[int, Tensor]:
    """Return the outputs [row, position, width] of the traced modules by layer; layers above the last one are not run."""
    states: dict[int, Tensor] = {}

    def record(layer: int, _module: Any, _args: Any, output: Any) -> None:
        states[layer] = shaped(first_of(output), *batch.tokens.shape).clone()
        if layer == max(layers):
            raise Stopped

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hooked(_module(parts, layer, part), after=partial(record, layer)))
        run(parts, batch)
    return states


def _restored_positions(rows: Sequence[EditRow], place: str, batch: Padded) -> Tensor:
    """Return a mask [row, position] of the states to restore."""
    mask = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start, stop = {"subject": row.span, "subject_last": (row.span[1] - 1, row.span[1]), "last": (row.start, row.start + 1)}[
            place
        ]
        mask[i, start:stop] = True
    return mask.to(batch.tokens.device)


def _restorer(state: Tensor, mask: Tensor, batch: Padded) -> Any:
    """Return a forward hook that replaces the output by `state` where `mask` is true."""

    def restore(_module: Any, _args: Any, output: Any) -> Any:
        hidden = first_of(output)
        mixed = torch.where(mask[..., None], state, shaped(hidden, *batch.tokens.shape))
        return with_first(output, mixed.reshape(hidden.shape))

    return restore


TOKENS, PREDICTIONS = 4096, 256
"""Limits of a batch: tokens including padding, and positions with logits. They keep memory independent of the number of facts."""


@no_grad
def said_by(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], device: torch.device
) -> list[bool]:
    """Return which facts a live model knows, from one forward pass over all of them.

    Prompt and target are forwarded together. If each token of the target is the most likely one after the tokens before it,
    greedy decoding gives the same tokens.

    Args:
        model: The model. Its text memory, if any, looks up the prompt alone, as it does in generation.
        tokenizer: The model's tokenizer.
        facts: The facts to check.
        device: The model's device.

    Returns:
        For each fact, whether the model gives its target.
    """
    head = model.get_output_embeddings()
    assert head is not None
    rows = [row_of(fact, tokenizer, "prompt_last") for fact in facts]
    recall: Any = getattr(model, "recall", None)
    if recall is None:
        return _check_rows(model, head, rows, device)
    pairs = [(list(row.tokens[: row.start + 1]), list(row.target)) for row in rows]
    for i, (context, target) in recall.pairs(pairs).items():
        rows[i] = replace(rows[i], tokens=(*context, *target[:-1]), start=len(context) - 1, lookup=len(context) - 1)
    with recall.paused():
        return _check_rows(model, head, rows, device)


def _check_rows(model: PreTrainedModel, head: torch.nn.Module, rows: Sequence[EditRow], device: torch.device) -> list[bool]:
    """Return for each row whether all tokens of its target are the most likely ones."""
    results = [False] * len(rows)
    for chosen in _batches(rows):
        batch = padded([rows[i] for i in chosen], device)
        with head_sees(head, batch.places):
            logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
        _, top = target_log_probabilities(logits, batch, len(chosen))
        for i, gives_target in zip(chosen, top.tolist(), strict=True):
            results[i] = gives_target
    return results


def _batches(rows: Sequence[EditRow]) -> Iterator[list[int]]:
    """Yield indices of rows that are forwarded together; rows of similar length share a batch."""
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].tokens)):
        positions = len(rows[i].target)
        if batch and (len(rows[i].tokens) * (len(batch) + 1) > TOKENS or total + positions > PREDICTIONS):
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += positions
    if batch:
        yield batch

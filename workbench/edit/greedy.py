"""Check whether a live model knows facts: its greedy answer to a prompt starts with the whole target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.edit.places.passes import target_log_probabilities
from workbench.edit.places.rows import EditRow, padded, row_of
from workbench.facts import Fact
from workbench.lazy import no_grad, torch
from workbench.models.hooks import head_sees

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS, PLACES = 4096, 256
"""Limits of a batch: tokens including padding, and positions with logits. They keep memory independent of the number of facts."""
SHOWN = 5


def told(row: Mapping[str, Any]) -> str:
    """Return the result as text: "46 of 48 facts (96 %); not said: a, b"."""
    missing: Sequence[str] = row["not_said"]
    names = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
    return f"{row['said']} of {row['facts']} facts ({100 * row['said'] / max(1, row['facts']):.0f} %)" + (
        f"; not said: {names}" if missing else ""
    )


def count(facts: Sequence[Fact], gives_target: Sequence[bool], min_efficacy: float) -> dict[str, Any]:
    """Return the record of a step: number of facts, number of targets that the model gives, and the IDs of the others."""
    missing = [fact.id for fact, given_target in zip(facts, gives_target, strict=True) if not given_target]
    return {"facts": len(facts), "said": sum(gives_target), "min_efficacy": min_efficacy, "not_said": missing}


def too_few(row: Mapping[str, Any]) -> bool:
    """Return whether the model gives fewer targets than the step requires."""
    return bool(row["said"] < row["min_efficacy"] * row["facts"])


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
        if batch and (len(rows[i].tokens) * (len(batch) + 1) > TOKENS or total + positions > PLACES):
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += positions
    if batch:
        yield batch

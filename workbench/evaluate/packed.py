"""Log-likelihoods of continuations with every token of a context forwarded once.

`packed`: a context and all its continuations stand in one row. A continuation sees the context and itself (block mask), and its positions
go on from the context's. `prefix`: what all contexts of a task begin with, such as few-shot examples, is forwarded once and kept as keys and
values. Both give lm-eval's HFLM numbers up to the rounding of another order of sums; `check` compares them before they count.

The output head sees only the positions that predict a continuation's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.models.attention import additive_masks, cache_name, head_sees, windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of a continuation, neither of them empty."""
Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would give the continuation."""

# A shared start shorter than this saves less than its pass costs.
LEAST_PREFIX = 16
# Masked attention between continuations costs time too: a row ends at so many tokens of continuations, or twice the context, and
# a continuation of more than _SHARE contexts stands alone, as running text does, whose context is one token.
_BRANCHES, _SHARE = 512, 8
# Bounds of one forward pass, in elements: float32 logits (256 MB), the mask, keys and values that follow a prefix.
LOGITS, _MASK, _CACHE = 1 << 26, 1 << 26, 1 << 29


@dataclass
class PackedRow:
    """One row of a forward pass.

    Attributes:
        tokens, positions: What is forwarded, without the shared prefix.
        segments: 0 for the context, then the number of the continuation that a token belongs to.
        answers: (pair, positions in the row whose logits predict it, its tokens).
        longest: Tokens of the longest pair in it when it is forwarded alone; what memory is reckoned by.
    """

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    answers: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    longest: int = 0

    @property
    def predicted(self) -> int:
        """Positions that the output head sees."""
        return sum(len(tokens) for *_, tokens in self.answers)


@dataclass(frozen=True)
class PackedLayout:
    """How a task's pairs are forwarded: the shared prefix, then batches of rows.

    Attributes:
        prefix: Tokens that all contexts of `whole` begin with.
        cut: Rows of pairs that are too long, batch by batch; without the prefix.
        whole: The other rows, batch by batch; after the prefix.
    """

    prefix: list[int]
    cut: list[list[PackedRow]]
    whole: list[list[PackedRow]]

    @property
    def tokens(self) -> int:
        """Tokens forwarded in all, padding left out."""
        return len(self.prefix) + sum(len(row.tokens) for batch in (*self.cut, *self.whole) for row in batch)

    def batches(self) -> Iterator[tuple[list[int], list[PackedRow]]]:
        """(prefix, rows) of every forward pass."""
        yield from (([], rows) for rows in self.cut)
        yield from ((self.prefix, rows) for rows in self.whole)


@dataclass(frozen=True)
class Bounds:
    """What bounds a forward pass.

    Attributes:
        max_length: Of the model, in tokens.
        batch_size: Pairs that HFLM would forward together; a batch of rows has at most as many tokens.
        vocabulary: Width of the logits.
        cached: Elements of keys and values of one token.
    """

    max_length: int
    batch_size: int
    vocabulary: int
    cached: int = 0


def lay_out(pairs: Sequence[Pair], bounds: Bounds, shared: Sequence[int] = ()) -> PackedLayout:
    """Pairs as rows, rows as batches; the same pairs give the same layout.

    A pair longer than the model's length + 1 is cut from the left, as lm-eval does, and stands alone, in front, without the prefix.

    Args:
        pairs: Contexts and continuations.
        bounds: Of a forward pass.
        shared: What every context that is not cut begins with (`shared_start`); forwarded once.
    """
    max_length = bounds.max_length
    open_rows: dict[tuple[int, ...], PackedRow] = {}
    rows: list[PackedRow] = []
    alone: list[PackedRow] = []
    for i, (context, answer) in enumerate(pairs):
        if len(context) + len(answer) > max_length + 1:
            kept = (context + answer)[-(max_length + 1) :]
            alone.append(_row(kept[: -len(answer)], 0))
            _append(alone[-1], max_length + 1 - len(answer), i, answer)
        else:
            row = open_rows.get(tuple(context))
            branches = len(row.tokens) + len(shared) - len(context) + len(answer) - 1 if row else 0
            if row is None or branches > max(_BRANCHES, 2 * len(context)) or len(answer) > _SHARE * len(context):
                row = open_rows[tuple(context)] = _row(context, len(shared))
                rows.append(row)
            _append(row, len(context), i, answer)
    parts = (sorted(found, key=lambda row: (-len(row.tokens), row.tokens)) for found in (alone, rows))
    cut, whole = (_batches(part, bounds, before) for part, before in zip(parts, (0, len(shared)), strict=True))
    return PackedLayout(list(shared), cut, whole)


def bounds_of(lm: Any) -> Bounds:
    """Bounds for lm-eval's model of a live model: its length and batch size, the width of the logits, keys and values of a token."""
    config = lm.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch = lm.batch_size if isinstance(lm.batch_size, int) else 32
    return Bounds(lm.max_length, batch, config.vocab_size, 2 * config.num_hidden_layers * heads * width)


def start_for(scorer: str, pairs: Sequence[Pair], bounds: Bounds) -> list[int]:
    """What a scorer forwards once for all pairs of a task: nothing for `packed`."""
    return shared_start(pairs, bounds.max_length) if scorer == "prefix" else []


def shared_start(pairs: Sequence[Pair], max_length: int) -> list[int]:
    """What the contexts that are not cut begin with, where forwarding it once is worth a pass; else nothing."""
    contexts = {tuple(c) for c, a in pairs if len(c) + len(a) <= max_length + 1}
    found = common([list(c) for c in contexts]) if len(contexts) > 1 else []
    return found if len(found) >= LEAST_PREFIX else []


def common(contexts: Sequence[list[int]]) -> list[int]:
    """The tokens that all contexts begin with; each keeps at least one of its own, whose logits are needed."""
    if not contexts:
        return []
    low, high = min(contexts), max(contexts)  # in order of tokens: what these two share all share
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: min(length, min(map(len, contexts)) - 1)]


def _row(context: list[int], shared: int) -> PackedRow:
    return PackedRow(context[shared:], list(range(shared, len(context))), [0] * (len(context) - shared))


def _append(row: PackedRow, length: int, pair: int, answer: list[int]) -> None:
    """A continuation behind a context of `length` tokens; its last token is predicted, not forwarded."""
    context_end = row.segments.count(0) - 1
    start = len(row.tokens)
    row.answers.append((pair, [context_end, *range(start, start + len(answer) - 1)], answer))
    row.tokens += answer[:-1]
    row.positions += range(length, length + len(answer) - 1)
    row.segments += [len(row.answers)] * (len(answer) - 1)
    row.longest = max(row.longest, length + len(answer) - 1)


def _batches(rows: Sequence[PackedRow], bounds: Bounds, shared: int) -> list[list[PackedRow]]:
    """Rows in order, as many a batch as HFLM's memory for its pairs and the bounds allow."""
    batches: list[list[PackedRow]] = []
    room = 0
    for row in rows:
        last = batches[-1] if batches else []
        many, width = len(last) + 1, max(len(r.tokens) for r in (*last, row))
        fits = (
            many <= bounds.batch_size
            and many * width <= room
            and many * width * (shared + width) <= _MASK
            and sum(r.predicted for r in (*last, row)) * bounds.vocabulary <= LOGITS
            and (not shared or many * (shared + width) * bounds.cached <= _CACHE)
        )
        if last and fits:
            last.append(row)
        else:
            batches.append([row])
            room = bounds.batch_size * row.longest
    return batches


class Forward:
    """Forwards batches of a layout through a model.

    Args:
        model: In evaluation mode; its attention takes a mask of [batch, 1, queries, keys].
    Errors: whatever the model raises on such a mask; wrong numbers are `check`'s to find.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        self.cache_name = cache_name(model)
        self.windows = windows(model.config)
        self._prefix: tuple[list[int], list[tuple[Tensor, Tensor]]] = ([], [])

    def answers(self, layout: PackedLayout) -> dict[int, Answer]:
        """Answers of all pairs of a layout."""
        found: dict[int, Answer] = {}
        for prefix, rows in layout.batches():
            found |= self.batch(prefix, rows)
        return found

    @torch.inference_mode()
    def batch(self, prefix: list[int], rows: Sequence[PackedRow]) -> dict[int, Answer]:
        """Answers of a batch's pairs, whose rows follow the prefix."""
        device, n = self.model.device, len(prefix)
        width = max(len(row.tokens) for row in rows)
        ids, positions, segments = (
            torch.tensor([part + [fill] * (width - len(part)) for part in parts], device=device)
            for parts, fill in (
                ([row.tokens for row in rows], 0), ([row.positions for row in rows], 0), ([row.segments for row in rows], -1))
        )  # fmt: skip
        branched = any(row.segments[-1] for row in rows)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": bool(n)}
        if n:
            inputs[self.cache_name] = self._cache(prefix, len(rows))
        if branched or n:
            inputs["attention_mask"] = self._masks(positions, segments, n)
        places = [i * width + place for i, row in enumerate(rows) for _, own, _ in row.answers for place in own]
        targets = torch.tensor([token for row in rows for *_, tokens in row.answers for token in tokens], device=device)
        with head_sees(self.head, torch.tensor(places, device=device)):
            logits = self.model(**inputs).logits[0]
        # HFLM's own expression: on the CPU it is 1e-5 nats a token off the exact value, and so are these numbers.
        likelihoods = torch.log_softmax(logits, -1, dtype=torch.float32).gather(1, targets[:, None])[:, 0].tolist()
        greedy = (logits.argmax(1) == targets).tolist()
        found, at = {}, 0
        for row in rows:
            for pair, own, _ in row.answers:
                found[pair] = (sum(likelihoods[at : at + len(own)]), all(greedy[at : at + len(own)]))
                at += len(own)
        return found

    def _masks(self, positions: Tensor, segments: Tensor, shared: int) -> Tensor | dict[str, Tensor]:
        """What each token sees: the prefix, and of its row what stands before it in the context or in its own continuation."""
        batch, width = positions.shape
        order = torch.arange(width, device=positions.device)
        inside = (order[None, :, None] >= order) & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))
        keys = positions
        if shared:
            inside = torch.cat((inside.new_ones(batch, width, shared), inside), 2)
            keys = torch.cat((torch.arange(shared, device=positions.device).expand(batch, -1), positions), 1)
        return additive_masks(inside, positions, keys, self.windows, self.model.dtype)

    def _cache(self, prefix: list[int], rows: int) -> Any:
        """Keys and values of the prefix for so many rows; computed when the prefix changes."""
        from transformers import DynamicCache

        if self._prefix[0] != prefix:
            cache = DynamicCache()  # without the configuration: sliding layers keep all, the mask hides what they do not see
            with head_sees(self.head, torch.zeros(1, dtype=torch.long, device=self.model.device)):
                ids = torch.tensor([prefix], device=self.model.device)
                self.model(input_ids=ids, use_cache=True, **{self.cache_name: cache})
            self._prefix = (prefix, [(layer.keys, layer.values) for layer in cache.layers])
        filled = DynamicCache()
        for index, (keys, values) in enumerate(self._prefix[1]):
            filled.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return filled

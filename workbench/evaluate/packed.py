"""Log-likelihoods of continuations, with every token of a context forwarded once.

`packed`: a context and all its continuations share a row. Each continuation sees the context and itself (block mask), and its
positions continue those of the context. `prefix`: the common beginning of a task's contexts, such as few-shot examples, is
forwarded once and kept as keys and values. Both equal lm-eval's HFLM up to the rounding of a different order of sums; `check`
compares them before they count.

The output head runs only on positions that predict a token of a continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.models.hooks import additive_masks, cache_name, head_sees, windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of a continuation; both are nonempty."""
Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would give the continuation."""

# A shared beginning shorter than this saves less than its forward pass costs.
LEAST_PREFIX = 16
# Masked attention between continuations costs time too. A row holds at most _BRANCHES tokens of continuations, or twice its context. A
# continuation longer than _SHARE contexts gets its own row, as does running text, whose context is one token.
_BRANCHES, _SHARE = 512, 8
# Limits of a forward pass, in elements: float32 logits (256 MB), the mask, and keys and values after a prefix.
LOGITS, MASK, CACHE = 1 << 26, 1 << 26, 1 << 29


@dataclass
class PackedRow:
    """One row of a forward pass.

    Attributes:
        tokens: Input tokens after the shared prefix.
        positions: Position of each token.
        segments: 0 for tokens of the context, else the number of the token's continuation.
        answers: For each continuation (pair, positions in the row whose logits predict it, its tokens).
        longest: Length of the longest pair in tokens when forwarded alone; used to estimate memory.
    """

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    answers: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    longest: int = 0

    @property
    def predicted(self) -> int:
        """Number of positions that the output head runs on."""
        return sum(len(tokens) for *_, tokens in self.answers)


@dataclass(frozen=True)
class PackedLayout:
    """Order in which a task's pairs are forwarded: the shared prefix, then batches of rows.

    Attributes:
        prefix: Tokens that all contexts in `with_prefix` begin with.
        without_prefix: Batches of rows with truncated pairs.
        with_prefix: Batches of the other rows, which follow the prefix.
    """

    prefix: list[int]
    without_prefix: list[list[PackedRow]]
    with_prefix: list[list[PackedRow]]

    @property
    def tokens(self) -> int:
        """Total number of tokens forwarded, without padding."""
        return len(self.prefix) + sum(len(row.tokens) for batch in (*self.without_prefix, *self.with_prefix) for row in batch)

    def batches(self) -> Iterator[tuple[list[int], list[PackedRow]]]:
        """Yield (prefix, rows) of every forward pass."""
        yield from (([], rows) for rows in self.without_prefix)
        yield from ((self.prefix, rows) for rows in self.with_prefix)


@dataclass(frozen=True)
class Bounds:
    """Limits of a forward pass.

    Attributes:
        max_length: The model's maximum length in tokens.
        batch_size: Pairs that HFLM would forward together; a batch of rows has at most as many tokens.
        vocabulary: Width of the logits.
        cached: Elements of keys and values per token.
    """

    max_length: int
    batch_size: int
    vocabulary: int
    cached: int = 0


def lay_out(pairs: Sequence[Pair], bounds: Bounds, shared: Sequence[int] = ()) -> PackedLayout:
    """Pack pairs into rows, and rows into batches; the same pairs always give the same layout.

    A pair longer than the model's length + 1 is cut from the left, as in lm-eval. It gets a row of its own, before the others and
    without the prefix.

    Args:
        pairs: Contexts and continuations.
        bounds: Limits of a forward pass.
        shared: Common beginning of all contexts that are not cut (`shared_start`); forwarded once.
    """
    max_length = bounds.max_length
    open_rows: dict[tuple[int, ...], PackedRow] = {}
    rows: list[PackedRow] = []
    truncated: list[PackedRow] = []
    for i, (context, answer) in enumerate(pairs):
        if len(context) + len(answer) > max_length + 1:
            tail = (context + answer)[-(max_length + 1) :]
            truncated.append(_row(tail[: -len(answer)], 0))
            _append(truncated[-1], max_length + 1 - len(answer), i, answer)
        else:
            row = open_rows.get(tuple(context))
            branches = len(row.tokens) + len(shared) - len(context) + len(answer) - 1 if row else 0
            if row is None or branches > max(_BRANCHES, 2 * len(context)) or len(answer) > _SHARE * len(context):
                row = open_rows[tuple(context)] = _row(context, len(shared))
                rows.append(row)
            _append(row, len(context), i, answer)
    without_prefix = _batches(_longest_first(truncated), bounds, 0)
    with_prefix = _batches(_longest_first(rows), bounds, len(shared))
    return PackedLayout(list(shared), without_prefix, with_prefix)


def bounds_of(lm: Any) -> Bounds:
    """Return the limits for lm-eval's wrapper of a live model."""
    config = lm.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch = lm.batch_size if isinstance(lm.batch_size, int) else 32
    return Bounds(lm.max_length, batch, config.vocab_size, 2 * config.num_hidden_layers * heads * width)


def start_for(scorer: str, pairs: Sequence[Pair], bounds: Bounds) -> list[int]:
    """Return the tokens that a scorer forwards once for all pairs of a task; none for `packed`."""
    return shared_start(pairs, bounds.max_length) if scorer == "prefix" else []


def shared_start(pairs: Sequence[Pair], max_length: int) -> list[int]:
    """Return the common beginning of the contexts that are not cut; none if forwarding it once does not pay off."""
    contexts = {tuple(c) for c, a in pairs if len(c) + len(a) <= max_length + 1}
    start = common([list(c) for c in contexts]) if len(contexts) > 1 else []
    return start if pays(start) else []


def pays(start: Sequence[int]) -> bool:
    """Return whether a shared beginning is long enough to be forwarded once."""
    return len(start) >= LEAST_PREFIX


def common(contexts: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all contexts begin with; each context keeps at least one token, whose logits are needed."""
    if not contexts:
        return []
    low, high = min(contexts), max(contexts)  # in lexicographic order: a prefix of both is a prefix of all
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: min(length, min(map(len, contexts)) - 1)]


def _row(context: list[int], shared: int) -> PackedRow:
    return PackedRow(context[shared:], list(range(shared, len(context))), [0] * (len(context) - shared))


def _append(row: PackedRow, length: int, pair: int, answer: list[int]) -> None:
    """Add a continuation after a context of `length` tokens; its last token is predicted, not forwarded."""
    context_end = row.segments.count(0) - 1
    start = len(row.tokens)
    row.answers.append((pair, [context_end, *range(start, start + len(answer) - 1)], answer))
    row.tokens += answer[:-1]
    row.positions += range(length, length + len(answer) - 1)
    row.segments += [len(row.answers)] * (len(answer) - 1)
    row.longest = max(row.longest, length + len(answer) - 1)


def _longest_first(rows: Sequence[PackedRow]) -> list[PackedRow]:
    return sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))


def _batches(rows: Sequence[PackedRow], bounds: Bounds, shared: int) -> list[list[PackedRow]]:
    """Group rows in order into batches, as large as the bounds and HFLM's memory for its own pairs allow."""
    batches: list[list[PackedRow]] = []
    room = 0
    for row in rows:
        last = batches[-1] if batches else []
        many, width = len(last) + 1, max(len(r.tokens) for r in (*last, row))
        fits = (
            many <= bounds.batch_size
            and many * width <= room
            and many * width * (shared + width) <= MASK
            and sum(r.predicted for r in (*last, row)) * bounds.vocabulary <= LOGITS
            and (not shared or many * (shared + width) * bounds.cached <= CACHE)
        )
        if last and fits:
            last.append(row)
        else:
            batches.append([row])
            room = bounds.batch_size * row.longest
    return batches


def answered(
    lm: Any, forward: Forward | None, pairs: Sequence[Pair], scorer: str, task: Sequence[Pair] | None = None
) -> list[Answer]:
    """Return the answers to pairs in their order.

    Args:
        lm: lm-eval's wrapper of a live model.
        forward: The scorer's forward passes; None: lm-eval's own.
        pairs: Contexts and continuations.
        scorer: Name of the scorer.
        task: Pairs whose shared beginning is forwarded once. Default: `pairs`.
    """
    if forward is None:
        return list(lm.referee(pairs))
    bounds = bounds_of(lm)
    answers = forward.answers(lay_out(pairs, bounds, start_for(scorer, task or pairs, bounds)))
    return [answers[i] for i in range(len(pairs))]


class Forward:
    """Run batches of a layout through a model.

    Errors of the model are raised as they are; `check` finds wrong numbers.

    Args:
        model: Model in evaluation mode, whose attention accepts a mask of [batch, 1, queries, keys].
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        self.cache_name = cache_name(model)
        self.windows = windows(model.config)
        self._prefix: tuple[list[int], list[tuple[Tensor, Tensor]]] = ([], [])

    def forget(self) -> None:
        """Forget the keys and values of the last prefix, because the model has changed."""
        self._prefix = ([], [])

    def answers(self, layout: PackedLayout) -> dict[int, Answer]:
        """Return the answers to all pairs of a layout."""
        answers: dict[int, Answer] = {}
        for prefix, rows in layout.batches():
            answers |= self.batch(prefix, rows)
        return answers

    @torch.inference_mode()
    def batch(self, prefix: list[int], rows: Sequence[PackedRow]) -> dict[int, Answer]:
        """Return the answers to a batch's pairs, whose rows follow the prefix."""
        device, n = self.model.device, len(prefix)
        width = max(len(row.tokens) for row in rows)
        ids, positions, segments = (
            torch.tensor([part + [fill] * (width - len(part)) for part in parts], device=device)
            for parts, fill in (
                ([row.tokens for row in rows], 0),
                ([row.positions for row in rows], 0),
                ([row.segments for row in rows], -1),
            )
        )
        branched = any(row.segments[-1] for row in rows)
        inputs: dict[str, object] = {"input_ids": ids, "position_ids": positions, "use_cache": bool(n)}
        if n:
            inputs[self.cache_name] = self.cache(prefix, len(rows))
        if branched or n:
            inputs["attention_mask"] = self._masks(positions, segments, n)
        places = [i * width + place for i, row in enumerate(rows) for _, predicting, _ in row.answers for place in predicting]
        targets = torch.tensor([token for row in rows for *_, tokens in row.answers for token in tokens], device=device)
        # The continuations of a context share the place that predicts their first tokens.
        different, at = torch.unique(torch.tensor(places, device=device), return_inverse=True)
        with head_sees(self.head, different):
            logits = self.model(**inputs).logits[0]
        # The same expression as in HFLM: on the CPU it is off by 1e-5 nats per token, and the numbers here must match it.
        likelihoods = torch.log_softmax(logits, -1, dtype=torch.float32)[at, targets].tolist()
        greedy = (logits.argmax(1)[at] == targets).tolist()
        answers, start = {}, 0
        for row in rows:
            for pair, predicting, _ in row.answers:
                answers[pair] = (sum(likelihoods[start : start + len(predicting)]), all(greedy[start : start + len(predicting)]))
                start += len(predicting)
        return answers

    def _masks(self, positions: Tensor, segments: Tensor, shared: int) -> Tensor | dict[str, Tensor]:
        """Return the mask: a token sees the prefix, and the earlier tokens of the context and of its own continuation."""
        batch, width = positions.shape
        order = torch.arange(width, device=positions.device)
        inside = (order[None, :, None] >= order) & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))
        keys = positions
        if shared:
            inside = torch.cat((inside.new_ones(batch, width, shared), inside), 2)
            keys = torch.cat((torch.arange(shared, device=positions.device).expand(batch, -1), positions), 1)
        return additive_masks(inside, positions, keys, self.windows, self.model.dtype)

    def cache(self, prefix: list[int], rows: int) -> Any:
        """Return keys and values of the prefix, which may be empty, for a number of rows; computed when the prefix changes."""
        from transformers import DynamicCache

        if not prefix:
            return DynamicCache()
        if self._prefix[0] != prefix:
            cache = (
                DynamicCache()
            )  # without the configuration, sliding layers keep all tokens; the mask hides those outside the window
            with head_sees(self.head, torch.zeros(1, dtype=torch.long, device=self.model.device)):
                ids = torch.tensor([prefix], device=self.model.device)
                self.model(input_ids=ids, use_cache=True, **{self.cache_name: cache})
            self._prefix = (prefix, [(layer.keys, layer.values) for layer in cache.layers])
        filled = DynamicCache()
        for index, (keys, values) in enumerate(self._prefix[1]):
            filled.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return filled

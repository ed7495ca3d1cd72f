"""Text memory of a live model: retrieve facts by similarity and credibility, and forward or generate with the facts in context.

A prompt is looked up by its text. The facts that apply are put before its tokens, after a beginning-of-text token if there is
one. Rows without a fact are not changed: their logits come from the original call with the whole batch and are bit-identical to
those without the memory.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from workbench.edit.memories.retrieval import Encoder
from workbench.facts.facts import UNSPACED, joined
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import max_positions
from workbench.models.hooks import CACHES
from workbench.steps import Remembered

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[list[int], list[int]]
FACTS = "{facts}"
_QUERY = 64  # number of tokens at a prompt's end that are looked up


@dataclass(frozen=True)
class FactStore:
    """Facts that can be retrieved.

    Attributes:
        facts: Facts that feedback has not dropped.
        encoder: Compares facts with prompts.
        threshold: Similarity from which a fact applies.
        max_facts: Largest number of facts that are put before a prompt.
        template: Text that is put before a prompt; `{facts}` stands for the facts as sentences, separated by spaces.
    """

    facts: Sequence[Remembered]
    encoder: Encoder
    threshold: float
    max_facts: int
    template: str

    @functools.cached_property
    def _similarities(self) -> Callable[[str], Tensor]:
        return self.encoder.against([r.tensors for r in self.facts])

    def recall(self, query: str) -> list[Remembered]:
        """Return the facts that apply to a prompt, by similarity plus credibility (highest first), then by ID."""
        if not self.facts or not query.strip():
            return []
        similarities = self._similarities(query).tolist()
        applicable = [
            (similarity + r.credibility.score(similarity), r.fact.id, r)
            for similarity, r in zip(similarities, self.facts, strict=True)
            if similarity >= self.threshold
        ]
        return [r for *_, r in sorted(applicable, key=lambda entry: (-entry[0], entry[1]))[: self.max_facts]]

    def context(self, query: str) -> str:
        """Return the text to put before a prompt, with the best fact last; empty if no fact applies."""
        facts = self.recall(query)
        if not facts:
            return ""
        text = functools.reduce(lambda before, after: before + joined(before, after), map(sentence, reversed(facts)))
        return self.template.replace(FACTS, text)


def sentence(remembered: Remembered) -> str:
    """Return a fact as a sentence: its prompt and target."""
    text = remembered.fact.text + remembered.fact.continuation
    if text[-1] in ".!?。．！？":
        return text
    return text + ("。" if text[-1] > "\u2e7f" and UNSPACED.fullmatch(text[-1]) else ".")


class Recall:
    """Text memory of a live model (`model.recall`). Scoring asks it for contexts, because scoring knows where a prompt ends."""

    def __init__(self, model: Any, tokenizer: Any, store: FactStore) -> None:
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.limit = max_positions(model.config)
        self._paused = 0
        self._contexts: dict[str, str] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Switch the memory off within the block."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @property
    def active(self) -> bool:
        """True if forward and generate look prompts up."""
        return not self._paused

    def extended(self, prompt: Sequence[int], reserved: int = 0) -> list[int] | None:
        """Return a prompt's tokens with the facts that apply before them.

        Args:
            prompt: Tokens without padding.
            reserved: Number of tokens that will follow.

        Returns:
            The tokens; None if no fact applies, or if they would exceed the model's length.
        """
        text = query_of(self.tokenizer, prompt)
        if text not in self._contexts:
            self._contexts[text] = self.store.context(text)
        if not self._contexts[text]:
            return None
        longer = in_front(self.tokenizer, self._contexts[text], prompt)
        return None if self.limit and len(longer) + reserved > self.limit else longer

    def pairs(self, pairs: Sequence[Pair]) -> dict[int, Pair]:
        """Return number -> (context with facts, continuation) for the pairs whose context has facts that apply."""
        extended = ((i, self.extended(context, len(answer)), answer) for i, (context, answer) in enumerate(pairs))
        return {i: (context, answer) for i, context, answer in extended if context is not None}

    def generate(
        self, ids: Tensor, mask: Tensor | None, max_new: int, pad: int, generate: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        """Continue rows with the facts that apply to them in context; the facts are not part of the result.

        Args:
            ids: [rows, time], with padding anywhere.
            mask: [rows, time]; None: no padding.
            max_new: Largest number of new tokens.
            pad: Token that fills up rows.
            generate: Maps (ids, mask) to [rows (times returned sequences), time + new tokens].
        """
        is_token = torch.ones_like(ids) if mask is None else mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, is_token, strict=True)]
        candidates = {i: self.extended(prompt, max_new) for i, prompt in enumerate(prompts)}
        extended_prompts = {i: extended for i, extended in candidates.items() if extended is not None}
        with self.paused():
            if not extended_prompts:
                return generate(ids, mask)
            continuations: dict[int, Tensor] = {}
            if len(extended_prompts) < len(prompts):
                continuations = dict(enumerate(_new_tokens(generate(ids, mask), len(prompts), ids.shape[1])))
            for rows in _group_by_length(extended_prompts):  # no padding: padding on the left shifts positions in some models
                batch = torch.tensor([extended_prompts[i] for i in rows], device=ids.device)
                generated = generate(batch, torch.ones_like(batch))
                continuations |= dict(zip(rows, _new_tokens(generated, len(rows), batch.shape[1]), strict=True))
        width = max(row.shape[1] for row in continuations.values())
        texts = []
        for i in range(len(prompts)):
            tail = torch.nn.functional.pad(continuations[i], (0, width - continuations[i].shape[1]), value=pad)
            texts.append(torch.cat((ids[i].expand(len(tail), -1), tail), 1))
        return torch.cat(texts)

    def logits(self, ids: Tensor, mask: Tensor | None) -> dict[int, Tensor]:
        """Return row -> logits [time, vocabulary] at its own positions, for rows with facts that apply to the whole row."""
        by_row: dict[int, Tensor] = {}
        for i, row in enumerate(ids):
            is_token = torch.ones_like(row, dtype=torch.bool) if mask is None else mask[i].bool()
            extended = self.extended(row[is_token].tolist())
            if extended is None:
                continue
            with self.paused():
                full = self.model(input_ids=torch.tensor([extended], device=ids.device)).logits[0]
            first = int(extended[0] == row[is_token][0] == self.tokenizer.bos_token_id)
            # Align at the end: after the facts, a prompt may begin with another token than on its own.
            by_row[i] = full.new_zeros(len(row), full.shape[1])
            by_row[i][is_token] = torch.cat((full[:first], full[len(extended) - int(is_token.sum()) + first :]))
        return by_row


def attach(model: Any, tokenizer: Any, store: FactStore) -> Recall:
    """Attach a text memory to a live model's forward and generate.

    `forward` looks up rows that are whole texts as tokens: not calls with a cache, with positions, or with masks of more than two
    dimensions.

    Args:
        model: The live model.
        tokenizer: Its tokenizer.
        store: The facts.

    Returns:
        The memory, which is also set as `model.recall`.
    """
    recall = Recall(model, tokenizer, store)
    forward, generate = model.forward, model.generate
    parameters = inspect.signature(forward)

    @functools.wraps(forward)
    def forward_with_memory(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        named = {**parameters.bind_partial(*args, **kwargs).arguments, **kwargs}
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if not recall.active or not isinstance(ids, torch.Tensor) or not _are_whole_texts(ids, mask, named):
            return output
        recalled = recall.logits(ids, mask)
        if not recalled:
            return output
        to_keep = named.get("logits_to_keep", 0)
        chosen = slice(-to_keep, None) if isinstance(to_keep, int) else to_keep
        rows = [recalled[i][chosen].to(row.dtype) if i in recalled else row for i, row in enumerate(output.logits)]
        # The cache is that of the texts without facts. Setting it to None would leave it in the output as a dictionary.
        left_out = {field.name: None for field in fields(output) if field.name in CACHES}
        output = replace(output, logits=torch.stack(rows), **left_out)
        if named.get("labels") is not None:
            output.loss = model.loss_function(output.logits, named["labels"], vocab_size=output.logits.shape[-1])
        return output

    @functools.wraps(generate)
    def generate_with_memory(inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        ids = kwargs.pop("input_ids", inputs)
        mask = kwargs.pop("attention_mask", None)
        settings = {**kwargs, **({"generation_config": generation_config} if generation_config is not None else {})}
        if not recall.active or not _are_whole_texts(ids, mask, kwargs):
            with recall.paused():
                return generate(ids, **({"attention_mask": mask} if mask is not None else {}), **settings)
        pad = kwargs.get("pad_token_id", getattr(generation_config or model.generation_config, "pad_token_id", None))
        pad = tokenizer.eos_token_id or 0 if pad is None else pad
        if mask is None and pad != tokenizer.eos_token_id and bool((ids == pad).any()):
            mask = (ids != pad).long()  # same rule as in transformers
        max_new = _max_new_tokens(model, kwargs, generation_config, ids.shape[1])

        def generate_from(ids_: Tensor, mask_: Tensor | None) -> Tensor:
            if ids_ is not ids and any(kwargs.get(name) is not None for name in CACHES):
                raise WorkbenchError(
                    "generate: a cache cannot be filled where a text memory puts facts before the prompt", "Remove the cache."
                )
            length = {"max_length": kwargs["max_length"] + ids_.shape[1] - ids.shape[1]} if kwargs.get("max_length") else {}
            output_ids = generate(ids_, **({"attention_mask": mask_} if mask_ is not None else {}), **{**settings, **length})
            if not isinstance(output_ids, torch.Tensor) and ids_ is not ids:
                raise WorkbenchError(
                    "generate: a model with a text memory returns only tokens", "Remove return_dict_in_generate."
                )
            return output_ids  # type: ignore[no-any-return]

        return recall.generate(ids, mask, max_new, pad, generate_from)

    model.forward, model.generate, model.recall = forward_with_memory, generate_with_memory, recall
    return recall


def query_of(tokenizer: Any, prompt: Sequence[int]) -> str:
    """Return the part of a prompt that is looked up: the last paragraph of its last `_QUERY` tokens."""
    text = str(tokenizer.decode(list(prompt)[-_QUERY:], skip_special_tokens=True))
    return text.rstrip().rpartition("\n\n")[2]


def in_front(tokenizer: Any, context: str, prompt: Sequence[int]) -> list[int]:
    """Return the tokens of a context and a prompt as one text, after the prompt's beginning-of-text token if it has one.

    If the prompt's tokens differ from those of its own text (cut off, or made by hand), they are kept as they are after the
    context's.
    """
    first = 1 if prompt and prompt[0] == tokenizer.bos_token_id else 0
    own_tokens = list(prompt[first:])
    text = str(tokenizer.decode(own_tokens, clean_up_tokenization_spaces=False))

    def encode(string: str) -> list[int]:
        return list(tokenizer(string, add_special_tokens=False)["input_ids"])

    if encode(text) == own_tokens and len(joint := encode(context + text)) >= len(own_tokens):
        return [*prompt[:first], *joint]
    return [*prompt[:first], *encode(context), *own_tokens]


def _group_by_length(rows: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Group row numbers by the length of their rows."""
    by_length: dict[int, list[int]] = {}
    for number, row in rows.items():
        by_length.setdefault(len(row), []).append(number)
    return list(by_length.values())


def _new_tokens(tokens: Tensor, rows: int, start: int) -> list[Tensor]:
    """Return the new tokens of each row: [returned sequences, tokens]."""
    return list(tokens[:, start:].reshape(rows, -1, tokens.shape[1] - start))


def _are_whole_texts(ids: Any, mask: Any, kwargs: Mapping[str, object]) -> bool:
    """Return whether a call passes whole texts as tokens: no cache, positions, embeddings or mask of more than two dimensions."""
    if (
        not isinstance(ids, torch.Tensor)
        or ids.dim() != 2
        or (mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2))
    ):
        return False
    caches = [cache for name in CACHES if (cache := kwargs.get(name)) is not None]
    return (
        kwargs.get("position_ids") is None
        and kwargs.get("inputs_embeds") is None
        and not any(not hasattr(cache, "get_seq_length") or cache.get_seq_length() for cache in caches)
    )


def _max_new_tokens(model: Any, kwargs: Mapping[str, Any], config: Any, length: int) -> int:
    """Return the largest number of tokens that a call of generate may add."""
    config = config or model.generation_config
    max_new = kwargs.get("max_new_tokens") or (None if kwargs.get("max_length") else getattr(config, "max_new_tokens", None))
    return (
        int(max_new) if max_new else max(0, int(kwargs.get("max_length") or getattr(config, "max_length", None) or 20) - length)
    )

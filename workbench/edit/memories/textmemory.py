"""Facts put in front of prompts on a live model: retrieval by likeness and credibility, then forward and generate with the facts in context.

A prompt is looked up by its text. The facts that apply are put in front of its tokens, behind a beginning-of-text token where there is one.
A row without such a fact is not touched: its logits come from the call that was made, with the whole batch, so that they are the same bits as
without the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.edit.memories.retrieval import Encoder
from workbench.errors import WorkbenchError
from workbench.models.architecture import max_positions
from workbench.steps import Remembered

Pair = tuple[list[int], list[int]]
FACTS = "{facts}"
_QUERY = 64  # last tokens of a prompt that are looked up


@dataclass(frozen=True)
class FactStore:
    """Facts that can be recalled.

    Attributes:
        facts: Those that feedback has not dropped.
        encoder: Compares them with prompts.
        threshold: Likeness from which a fact applies.
        most: Facts that are put in front of a prompt, at most.
        template: What stands in front of a prompt; `{facts}` are the facts as sentences, one blank between them.
    """

    facts: Sequence[Remembered]
    encoder: Encoder
    threshold: float
    most: int
    template: str

    @functools.cached_property
    def _alike(self) -> Callable[[str], Tensor]:
        return self.encoder.against([r.tensors for r in self.facts])

    def recall(self, query: str) -> list[Remembered]:
        """Facts that apply to a prompt, best first: those alike enough, by likeness + credibility, then by id."""
        if not self.facts or not query.strip():
            return []
        found = self._alike(query).tolist()
        inside = [
            (alike + r.credibility.score(alike), r.fact.id, r)
            for alike, r in zip(found, self.facts, strict=True)
            if alike >= self.threshold
        ]
        return [r for *_, r in sorted(inside, key=lambda entry: (-entry[0], entry[1]))[: self.most]]

    def context(self, query: str) -> str:
        """The text to put in front of a prompt, the best fact last; empty where none applies."""
        found = self.recall(query)
        return self.template.replace(FACTS, " ".join(sentence(r) for r in reversed(found))) if found else ""


def sentence(remembered: Remembered) -> str:
    """A fact as a sentence: prompt and target."""
    text = remembered.fact.text + remembered.fact.continuation
    return text if text[-1] in ".!?" else f"{text}."


class Recall:
    """A live model's text memory: `model.recall`. Scoring asks it for contexts, since there the end of the prompt is known."""

    def __init__(self, model: Any, tokenizer: Any, store: FactStore) -> None:
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.limit = max_positions(model.config)
        self._paused = 0
        self._known: dict[str, str] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model without its memory."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @property
    def active(self) -> bool:
        """Whether forward and generate look prompts up."""
        return not self._paused

    def extended(self, prompt: Sequence[int], room: int = 0) -> list[int] | None:
        """A prompt's tokens with the facts that apply in front; None where none does, or the model's length would be exceeded.

        Args:
            prompt: Its tokens, without padding.
            room: Tokens that are to follow it.
        """
        text = query_of(self.tokenizer, prompt)
        if text not in self._known:
            self._known[text] = self.store.context(text)
        if not self._known[text]:
            return None
        longer = in_front(self.tokenizer, self._known[text], prompt)
        return None if self.limit and len(longer) + room > self.limit else longer

    def pairs(self, pairs: Sequence[Pair]) -> dict[int, Pair]:
        """Number of a (context, continuation) -> the same with facts in front of the context, where facts apply to the context."""
        found = ((i, self.extended(context, len(answer)), answer) for i, (context, answer) in enumerate(pairs))
        return {i: (context, answer) for i, context, answer in found if context is not None}

    def generate(
        self, ids: Tensor, mask: Tensor | None, room: int, pad: int, generate: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        """Continue rows, those that facts apply to with the facts in front, and give them back without.

        Args:
            ids, mask: [rows, time], padding anywhere.
            room: Tokens that may be made.
            pad: Token that fills rows up.
            generate: (ids, mask) -> [rows (times returned sequences), time + made].
        """
        prompts = [
            row[keep.bool()].tolist() for row, keep in zip(ids, torch.ones_like(ids) if mask is None else mask, strict=True)
        ]
        longer = {i: found for i, prompt in enumerate(prompts) if (found := self.extended(prompt, room)) is not None}
        with self.paused():
            if not longer:
                return generate(ids, mask)
            made = {} if len(longer) == len(prompts) else dict(enumerate(_rows(generate(ids, mask), len(prompts), ids.shape[1])))
            for same in _of_one_length(longer):  # none of them is padded: padding in front moves positions in some models
                wide = torch.tensor([longer[i] for i in same], device=ids.device)
                texts = generate(wide, torch.ones_like(wide))
                made |= dict(zip(same, _rows(texts, len(same), wide.shape[1]), strict=True))
        width = max(row.shape[1] for row in made.values())
        whole = []
        for i in range(len(prompts)):
            rest = torch.nn.functional.pad(made[i], (0, width - made[i].shape[1]), value=pad)
            whole.append(torch.cat((ids[i].expand(len(rest), -1), rest), 1))
        return torch.cat(whole)

    def logits(self, ids: Tensor, mask: Tensor | None) -> dict[int, Tensor]:
        """Row -> logits [time, vocabulary] at its own positions, of rows that facts apply to; the whole row is looked up."""
        found: dict[int, Tensor] = {}
        for i, row in enumerate(ids):
            own = torch.ones_like(row, dtype=torch.bool) if mask is None else mask[i].bool()
            longer = self.extended(row[own].tolist())
            if longer is None:
                continue
            with self.paused():
                made = self.model(input_ids=torch.tensor([longer], device=ids.device)).logits[0]
            first = int(longer[0] == row[own][0] == self.tokenizer.bos_token_id)
            # Counted from the end: behind the facts a prompt may begin with another token than alone.
            found[i] = made.new_zeros(len(row), made.shape[1])
            found[i][own] = torch.cat((made[:first], made[len(longer) - int(own.sum()) + first :]))
        return found


def attach(model: Any, tokenizer: Any, store: FactStore) -> Recall:
    """Let a live model's forward and generate recall; returns what `model.recall` then is.

    `forward` looks rows up where it is given whole texts as tokens: not with a cache, with positions, or with masks of more than two dimensions.
    """
    recall = Recall(model, tokenizer, store)
    forward, generate = model.forward, model.generate

    @functools.wraps(forward)
    def recalling(*args: Any, **given: Any) -> Any:
        output = forward(*args, **given)
        ids = given.get("input_ids", args[0] if args else None)
        mask = given.get("attention_mask", args[1] if len(args) > 1 else None)
        if not recall.active or len(args) > 2 or not isinstance(ids, Tensor) or not _whole_texts(ids, mask, given):
            return output
        found = recall.logits(ids, mask)
        if not found:
            return output
        keep = given.get("logits_to_keep", 0)
        chosen = slice(-keep, None) if isinstance(keep, int) else keep
        output.logits = torch.stack(
            [found[i][chosen].to(row.dtype) if i in found else row for i, row in enumerate(output.logits)]
        )
        output.past_key_values = None  # holds the texts without the facts
        if given.get("labels") is not None:
            output.loss = model.loss_function(output.logits, given["labels"], vocab_size=output.logits.shape[-1])
        return output

    @functools.wraps(generate)
    def continuing(inputs: Tensor | None = None, generation_config: Any = None, **given: Any) -> Any:
        ids = given.pop("input_ids", inputs)
        mask = given.pop("attention_mask", None)
        settings = {**given, **({"generation_config": generation_config} if generation_config is not None else {})}
        if not recall.active or not _whole_texts(ids, mask, given):
            with recall.paused():
                return generate(ids, **({"attention_mask": mask} if mask is not None else {}), **settings)
        pad = given.get("pad_token_id", getattr(generation_config or model.generation_config, "pad_token_id", None))
        pad = tokenizer.eos_token_id or 0 if pad is None else pad
        if mask is None and pad != tokenizer.eos_token_id and bool((ids == pad).any()):
            mask = (ids != pad).long()  # as transformers takes it
        room = _room(model, given, generation_config, ids.shape[1])

        def more(ids_: Tensor, mask_: Tensor | None) -> Tensor:
            length = {"max_length": given["max_length"] + ids_.shape[1] - ids.shape[1]} if given.get("max_length") else {}
            made = generate(ids_, **({"attention_mask": mask_} if mask_ is not None else {}), **{**settings, **length})
            if not isinstance(made, Tensor) and ids_ is not ids:
                raise WorkbenchError("generate: a text memory gives back tokens alone", "Leave return_dict_in_generate out.")
            return made  # type: ignore[no-any-return]

        return recall.generate(ids, mask, room, pad, more)

    model.forward, model.generate, model.recall = recalling, continuing, recall
    return recall


def query_of(tokenizer: Any, prompt: Sequence[int]) -> str:
    """What of a prompt is looked up: its last paragraph, at most so many tokens of it."""
    text = str(tokenizer.decode(list(prompt)[-_QUERY:], skip_special_tokens=True))
    return text.rstrip().rpartition("\n\n")[2]


def in_front(tokenizer: Any, context: str, prompt: Sequence[int]) -> list[int]:
    """Return the tokens of a context and a prompt as one text, behind the prompt's beginning-of-text token if it has one.

    Where the prompt's tokens are not those of their own text (cut off, or made by hand) they stay as they are behind the context's.
    """
    first = 1 if prompt and prompt[0] == tokenizer.bos_token_id else 0
    rest = list(prompt[first:])
    text = str(tokenizer.decode(rest, clean_up_tokenization_spaces=False))

    def tokens(of: str) -> list[int]:
        return list(tokenizer(of, add_special_tokens=False)["input_ids"])

    if tokens(text) == rest and len(whole := tokens(context + text)) >= len(rest):
        return [*prompt[:first], *whole]
    return [*prompt[:first], *tokens(context), *rest]


def _of_one_length(rows: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Numbers of the rows, those of equally long rows together."""
    found: dict[int, list[int]] = {}
    for number, row in rows.items():
        found.setdefault(len(row), []).append(number)
    return list(found.values())


def _rows(made: Tensor, rows: int, start: int) -> list[Tensor]:
    """What was made for each row: [returned sequences, tokens]."""
    return list(made[:, start:].reshape(rows, -1, made.shape[1] - start))


def _whole_texts(ids: Any, mask: Any, given: Mapping[str, Any]) -> bool:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or (mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2)):
        return False
    cache = given.get("past_key_values")
    return (
        given.get("position_ids") is None
        and given.get("inputs_embeds") is None
        and not (cache is not None and cache.get_seq_length())
    )


def _room(model: Any, given: Mapping[str, Any], config: Any, length: int) -> int:
    """Tokens that a call of generate may make."""
    config = config or model.generation_config
    most = given.get("max_new_tokens") or (None if given.get("max_length") else getattr(config, "max_new_tokens", None))
    return int(most) if most else max(0, int(given.get("max_length") or getattr(config, "max_length", None) or 20) - length)

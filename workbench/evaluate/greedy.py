"""Greedy texts: the common beginning of prompts is forwarded once, and a row leaves its batch when its text has ended.

lm-eval's HFLM goes on until every row of a batch has met the same stop string, and cuts the texts afterwards. The texts here are those that
it writes for one prompt at a time. In narrow dtypes two tokens can be equally likely up to rounding; which of them HFLM writes depends on its
batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.evaluate.packed import CACHE, MASK, Forward, bounds_of, common, pays
from workbench.models.hooks import additive_masks, head_sees

if TYPE_CHECKING:
    from workbench.evaluate.hflm import SafeHFLM

_GREEDY = {"do_sample": (False,), "temperature": (0.0, None)}
_WITHOUT_EFFECT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache", "max_length", "max_new_tokens"),
    *(
        "_from_model_config",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "return_dict_in_generate",
    ),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
)
"""Settings of generation_config.json that change no greedy text here: the last are for sampled texts."""
_COMPACT = 4  # rows that have ended leave the batch when they are this part of it; copying the others' keys and values costs time
_MARGIN = 8  # tokens that a stop string may need beyond its characters
_COMPARED = 8  # new tokens of a prompt that is compared with HFLM


@dataclass(frozen=True)
class Prompt:
    """A prompt as lm-eval passes it to `generate`.

    Attributes:
        tokens: Its tokens, cut from the left if they are too many.
        stops: Strings that end its text, the end of text among them.
        most: Largest number of new tokens.
    """

    tokens: list[int]
    stops: tuple[str, ...]
    most: int


def is_greedy(lm: SafeHFLM, settings: Mapping[str, Any]) -> bool:
    """Return whether a `Writer` can stand for HFLM: one most likely text, from a model whose keys and values are those of its tokens.

    HFLM writes the texts of models with a memory, and of those whose bricks act by tokens. After a special token as a stop string its
    texts go on until the whole batch has met it, which would differ here.
    """
    model: Any = lm.model
    if any(token in str(settings.get("until")) for token in {*lm.tokenizer.all_special_tokens} - {lm.tokenizer.eos_token}):
        return False
    ours = all(settings[name] in _GREEDY[name] for name in _GREEDY if name in settings)
    if not ours or {*settings} - {*_GREEDY, "until", "max_gen_toks"}:
        return False
    if {*model.generation_config.to_diff_dict()} - {*_WITHOUT_EFFECT}:
        return False
    routing = getattr(model, "routing", None)
    if routing is not None and (routing.by_token or routing.whole_rows):
        return False
    return not getattr(model, "_is_stateful", False) and getattr(model, "recall", None) is None


def prompt_of(lm: SafeHFLM, context: str, settings: Mapping[str, Any]) -> Prompt:
    """Return a request's prompt, with lm-eval's own defaults."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    known: Any = normalize_gen_kwargs(dict(settings), lm.max_gen_toks)
    end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    most = int(known["max_gen_toks"])
    ids, mask = lm.tok_batch_encode([context], left_truncate_len=lm.max_length - most, truncation=lm.truncation)
    return Prompt(ids[0][mask[0].bool()].tolist(), tuple(handle_stop_sequences(known.get("until"), eos=end)), most)


def batches(lm: SafeHFLM, prompts: Mapping[int, Prompt]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (shared beginning, numbers of prompts) of each batch, the longest prompts first; the same prompts give the same batches."""
    bounds = bounds_of(lm)
    alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for number, prompt in prompts.items():
        alike.setdefault((prompt.stops, prompt.most), []).append(number)
    for members in alike.values():
        start = _shared([prompts[number] for number in members])
        batch: list[int] = []
        for number in sorted(members, key=lambda n: (-len(prompts[n].tokens), prompts[n].tokens)):
            first = prompts[batch[0] if batch else number]
            many, width = len(batch) + 1, len(first.tokens) - len(start)
            masked, kept = many * width * len(first.tokens), many * (len(first.tokens) + first.most) * bounds.cached
            if batch and (many > bounds.batch_size or masked > MASK or kept > CACHE):
                yield start, batch
                batch = []
            batch.append(number)
        yield start, batch


def _shared(prompts: Sequence[Prompt]) -> list[int]:
    """Return the common beginning of prompts if it is worth a pass of its own."""
    start = common([prompt.tokens for prompt in prompts]) if len(prompts) > 1 else []
    return start if pays(start) else []


def compare(lm: SafeHFLM, forward: Forward, tasks: Sequence[Mapping[int, Prompt]], *, short: bool) -> int:
    """Compare the beginnings of texts with those that HFLM writes for one prompt at a time, and return the number of prompts.

    Args:
        lm: HFLM on the model that `forward` runs, which should be in float32: two likely tokens may change places in narrower dtypes.
        forward: Forward passes.
        tasks: Prompts of each task.
        short: Compare one prompt. Default: the longest and the shortest of a task, in one batch, and those of a task whose prompts share
            a beginning; each time the task with the shortest prompts.

    Raises:
        RefusedError: If texts differ, or the model raises an error for the one and none for HFLM.
    """
    from workbench.evaluate.check import MODEL_ERRORS, RefusedError, in_one_line

    cheapest: dict[bool, tuple[list[int], list[Prompt]]] = {}
    for task in tasks:
        prompts = sorted(task.values(), key=lambda prompt: len(prompt.tokens))
        shared = _shared(prompts) if not short else []
        if bool(shared) not in cheapest or len(prompts[-1].tokens) < len(cheapest[bool(shared)][1][-1].tokens):
            cheapest[bool(shared)] = shared, prompts
    count = 0
    for shared, prompts in cheapest.values():
        ends = prompts[:1] if short or len(prompts) == 1 else [prompts[0], prompts[-1]]
        asked = [replace(prompt, most=min(prompt.most, _COMPARED)) for prompt in ends]
        try:
            ours = Writer(lm, forward).write(shared, asked)
        except FloatingPointError:  # the weights are broken, which scoring the task reports
            break
        except MODEL_ERRORS as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            lm.written(asked[0].tokens, asked[0].stops, asked[0].most)  # where this fails too, the model is at fault
            raise RefusedError(in_one_line(error)) from error
        for prompt, text in zip(asked, ours, strict=True):
            theirs = lm.written(prompt.tokens, prompt.stops, prompt.most)
            if text != theirs:
                raise RefusedError(f"hflm writes {theirs!r} where another text was written: {text!r}")
        count += len(asked)
    return count


class Writer:
    """Writes greedy texts with a live model.

    Args:
        lm: HFLM on the model.
        forward: Its forward passes, which keep the keys and values of the last shared beginning.
    """

    def __init__(self, lm: SafeHFLM, forward: Forward) -> None:
        self.lm, self.forward = lm, forward
        ends = lm.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, (list, tuple)) else [ends])} - {None}

    @torch.inference_mode()
    def write(self, shared: list[int], prompts: Sequence[Prompt]) -> list[str]:
        """Return the texts of prompts that begin with `shared` and have the same settings.

        Raises:
            FloatingPointError: If logits are NaN.
        """
        row = _Rows(self.forward, shared, [prompt.tokens[len(shared) :] for prompt in prompts], prompts[0].most)
        added: list[list[int]] = [[] for _ in prompts]
        alive, ended = list(range(len(prompts))), set[int]()
        logits = row.begin()
        while True:
            if logits.isnan().any():
                raise FloatingPointError
            tokens = logits.argmax(-1)
            for number, token in zip(alive, tokens.tolist(), strict=True):
                if number not in ended:
                    added[number].append(token)
                    if self._ended(added[number], prompts[number]):
                        ended.add(number)
            going = [i for i, number in enumerate(alive) if number not in ended]
            if not going:
                break
            if (len(alive) - len(going)) * _COMPACT >= len(alive):
                row.keep(going)
                alive, tokens = [alive[i] for i in going], tokens[going]
            logits = row.step(tokens)
        return [self.lm.cut(tokens, prompt.stops) for tokens, prompt in zip(added, prompts, strict=True)]

    def _ended(self, tokens: Sequence[int], prompt: Prompt) -> bool:
        """Return whether a text has ended: by its length, the end of text, or a stop string."""
        if len(tokens) >= prompt.most or tokens[-1] in self.ends:
            return True
        stops = [stop for stop in prompt.stops if stop]
        tail = tokens[-max(map(len, stops), default=0) - _MARGIN :]
        last, whole = (self.lm.tok_decode(part, skip_special_tokens=False) for part in (tail, tokens))
        return any(stop in last and stop in whole for stop in stops)


class _Rows:
    """Rows of a batch, with their keys and values: those of the shared beginning, of the prompts filled up on the right, of new tokens.

    Args:
        forward: Forward passes of the model.
        shared: Tokens that all prompts begin with.
        rows: The tokens after them, at least one each.
        most: Largest number of new tokens.
    """

    def __init__(self, forward: Forward, shared: list[int], rows: Sequence[list[int]], most: int) -> None:
        self.forward = forward
        self.device, n, width = forward.model.device, len(shared), max(map(len, rows))
        self.ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        self.lengths = torch.tensor([len(row) for row in rows], device=self.device)
        # The place of each key in its text. New tokens follow their own prompt, and padding is never seen.
        places = torch.arange(n + width + most, device=self.device).expand(len(rows), -1)
        self.places = torch.where(places >= n + width, places - width + self.lengths[:, None], places)
        self.real = (places < n + self.lengths[:, None]) | (places >= n + width)
        self.cache = forward.cache(shared, len(rows))
        self.used = n

    def begin(self) -> Tensor:
        """Forward the prompts, and return the logits after each [row, vocabulary]."""
        width = self.ids.shape[1]
        last = torch.arange(len(self.ids), device=self.device) * width + self.lengths - 1
        return self._forward(self.ids, last)

    def step(self, tokens: Tensor) -> Tensor:
        """Forward one new token of each row, and return the logits after it [row, vocabulary]."""
        return self._forward(tokens[:, None], torch.arange(len(tokens), device=self.device))

    def keep(self, rows: list[int]) -> None:
        """Keep only some rows."""
        self.cache.batch_select_indices(torch.tensor(rows, device=self.device))
        self.places, self.real = self.places[rows], self.real[rows]

    def _forward(self, ids: Tensor, last: Tensor) -> Tensor:
        forward, stop = self.forward, self.used + ids.shape[1]
        positions, keys = self.places[:, self.used : stop], self.places[:, :stop]
        seen = self.real[:, None, :stop] & (keys[:, None] <= positions[:, :, None])
        mask = additive_masks(seen, positions, keys, forward.windows, forward.model.dtype)
        inputs: dict[str, object] = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": True}
        with head_sees(forward.head, last):
            logits: Tensor = forward.model(**inputs, **{forward.cache_name: self.cache}).logits[0]
        self.used = stop
        return logits

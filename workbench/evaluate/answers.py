"""A model's own greedy answers to prompts, confirmed by lm-eval's teacher-forced scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from workbench.evaluate.hflm import SafeHFLM
from workbench.evaluate.measured import quiet, seeded
from workbench.evaluate.packed import Pair
from workbench.facts.facts import joined
from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import load_tokenizer, worded

STOPS = ("\n", ".")
_ROWS = 8  # rows of a forward pass that keeps all logits
_ULPS = 4
OnProgress = Callable[[int, int], None]


def answers_to_keep(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    chat_template: bool = False,
    batch_size: int = 32,
    progress: OnProgress | None = None,
) -> dict[str, str]:
    """Return each prompt's greedy continuation, up to a line break, a full stop or the end of text.

    Every token of an answer is clearly the most likely one when the text is tokenized again. If that fails (two tokens are
    equally likely in the weights' dtype, the last word is cut off, or the joined text is tokenized differently), words are
    removed from the end until it holds; the first word is always kept. Prompts after which the model ends the text at once are
    left out.

    Args:
        model: Live model in evaluation mode.
        tokenizer: Its tokenizer, or the folder of one.
        prompts: The prompts.
        tokens: Largest number of tokens of an answer.
        chat_template: Put prompts into the chat template.
        batch_size: Prompts per forward pass.
        progress: Called with (prompts done, prompts in total).
    """
    with quiet(), seeded():
        lm, contexts = _opened(model, tokenizer, prompts, chat_template, batch_size)
        written = _written(lm, list(contexts.values()), STOPS, tokens, progress)
        silent = [c for c in contexts.values() if not written[c].strip()]
        written |= _written(lm, silent, (), tokens, None)
        confirmed = _confirmed(lm, {c: text for c, text in written.items() if text.strip()}, chat_template)
        return {p: confirmed[c] for p, c in contexts.items() if c in confirmed}


def first_tokens(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    clear: bool = False,
    chat_template: bool = False,
    progress: OnProgress | None = None,
) -> dict[str, str]:
    """Return the first greedy tokens after each prompt as text, whatever the text and, unless `clear`, however small their lead.

    Every token is the most likely one in a forward pass over the prompt and the tokens before it, without a cache, in the weights'
    dtype. A second pass over the whole text confirms them. The text ends before end of text, and earlier if fewer tokens give the same
    tokens when the text is tokenized again. Prompts without a confirmed text are left out.

    Args:
        model: Live model in evaluation mode.
        tokenizer: Its tokenizer, or the folder of one.
        prompts: The prompts.
        tokens: Number of tokens.
        clear: Leave out prompts with a token whose lead rounding in the weights' dtype can change.
        chat_template: Put prompts into the chat template.
        progress: Called with (prompts done, prompts in total).
    """
    with quiet(), seeded():
        lm, contexts = _opened(model, tokenizer, prompts, chat_template, _ROWS)
        ids = {c: list(lm.tok_encode(c)) for c in contexts.values()}
        by_length = sorted((c for c in ids if ids[c] and len(ids[c]) + tokens <= lm.max_length), key=lambda c: (len(ids[c]), c))
        found: dict[str, str] = {}
        for start in range(0, len(by_length), _ROWS):
            batch = by_length[start : start + _ROWS]
            texts = _retokenized(lm, ids, dict(zip(batch, _continued(lm, [ids[c] for c in batch], tokens), strict=True)))
            pairs = [pair for c, text in texts.items() for (pair,) in lm.pairs([_request(c, text)])]
            same = _greedy(lm, pairs) if clear else [_most_likely(row) == answer for row, answer in _answer_logits(lm, pairs)]
            found |= {c: text for (c, text), right in zip(texts.items(), same, strict=True) if right}
            if progress:
                progress(start + len(batch), len(by_length))
        return {p: found[c] for p, c in contexts.items() if c in found}


def _opened(
    model: Any, tokenizer: Any, prompts: Sequence[str], chat_template: bool, batch_size: int
) -> tuple[SafeHFLM, dict[str, str]]:
    """Return the model as lm-eval scores it, and prompt -> the text that the model reads, which has tokens."""
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    lm = SafeHFLM(model, tokenizer=tokenizer, batch_size=batch_size)
    contexts = {p: worded(lm.tokenizer, [{"role": "user", "content": p}], p) if chat_template else p for p in prompts}
    if (empty := next((p for p, context in contexts.items() if not lm.tok_encode(context)), None)) is not None:
        words = "the chat template gives the prompt no tokens" if chat_template else "the prompt has no tokens"
        raise WorkbenchError(f"{empty!r}: {words}", "Correct the prompt, or the tokenizer's files.")
    return lm, contexts


def _continued(lm: SafeHFLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Return the greedy tokens after tokenized prompts, up to end of text."""
    added: list[list[int]] = [[] for _ in prompts]
    for _ in range(tokens):
        # The token after the last one does not matter: it only marks the position whose logits are read.
        rows = [([*prompt, *new], [0]) for prompt, new in zip(prompts, added, strict=True)]
        for new, (logits, _) in zip(added, _answer_logits(lm, rows), strict=True):
            new += _most_likely(logits)
    end = lm.tokenizer.eos_token_id
    return [new[: new.index(end)] if end in new else new for new in added]


def _retokenized(lm: SafeHFLM, prompts: Mapping[str, list[int]], added: Mapping[str, list[int]]) -> dict[str, str]:
    """Return context -> the text of the most tokens that lm-eval reads as the same tokens; contexts without one are left out."""
    texts: dict[str, str] = {}
    for context, new in added.items():
        before = lm.tok_decode(prompts[context], skip_special_tokens=False)
        for count in range(len(new), 0, -1):
            whole = [*prompts[context], *new[:count]]
            text = lm.tok_decode(whole, skip_special_tokens=False)
            if not text.startswith(before) or len(text) == len(before):
                continue
            ((pair,),) = lm.pairs([_request(context, text[len(before) :])])
            if [*pair[0], *pair[1]] == whole:
                texts[context] = text[len(before) :]
                break
    return texts


def _written(
    lm: SafeHFLM, contexts: Sequence[str], stops: Sequence[str], tokens: int, progress: OnProgress | None
) -> dict[str, str]:
    """Generate texts, in batches of prompts of similar length."""
    settings = {"until": list(stops), "max_gen_toks": tokens, "do_sample": False}
    by_length = sorted(dict.fromkeys(contexts), key=lambda c: (-len(lm.tok_encode(c)), c))
    batch_size: Any = lm.batch_size
    texts: dict[str, str] = {}
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        requests = [Instance(request_type="generate_until", doc={}, arguments=(c, settings), idx=0) for c in batch]
        texts |= dict(zip(batch, lm.generate_until(requests, disable_tqdm=True), strict=True))
        if progress:
            progress(len(texts), len(by_length))
    return texts


def _confirmed(lm: SafeHFLM, written: Mapping[str, str], chat: bool) -> dict[str, str]:
    """Return context -> the longest start of its text, cut between words, that is greedy when scored; the shortest if none is."""
    candidates = {context: _shortened(context, text, chat) for context, text in written.items()}
    confirmed = {context: texts[-1] for context, texts in candidates.items()}
    while candidates:
        answers = {context: texts.pop(0) for context, texts in candidates.items()}
        pairs = [pair for c, a in answers.items() for (pair,) in lm.pairs([_request(c, a)])]
        tokenized = [i for i, (_, answer) in enumerate(pairs) if answer]
        greedy = dict(zip(tokenized, _greedy(lm, [pairs[i] for i in tokenized]), strict=True))
        for i, (context, answer) in enumerate(answers.items()):
            if greedy.get(i):
                confirmed[context] = answer
                del candidates[context]
            elif not candidates[context]:
                del candidates[context]
    return confirmed


def _greedy(lm: SafeHFLM, pairs: Sequence[Pair]) -> list[bool]:
    """Return whether every token of an answer leads all others by more than rounding in the weights' dtype can change."""
    greedy: list[bool] = []
    for logits, answer in _answer_logits(lm, pairs):
        values, tokens = logits.topk(2)
        clear = values[:, 0] - values[:, 1] > _ULPS * torch.finfo(lm.model.dtype).eps * values[:, 0].abs()
        greedy.append(bool(clear.all()) and tokens[:, 0].tolist() == answer)
    return greedy


def _most_likely(logits: torch.Tensor) -> list[int]:
    return [int(token) for token in logits.argmax(-1)]


@torch.inference_mode()
def _answer_logits(lm: SafeHFLM, pairs: Sequence[Pair]) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Yield the logits [time, vocabulary] of each answer's tokens, and the answer."""
    for start in range(0, len(pairs), _ROWS):
        batch = pairs[start : start + _ROWS]
        width = max(len(context) + len(answer) for context, answer in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, (context, answer) in zip(ids, batch, strict=True):
            row[: len(context) + len(answer)] = torch.tensor(context + answer)
        # Padding on the right is invisible to a causal model.
        logits = lm.model(input_ids=ids.to(lm.device)).logits.float().cpu()
        for row, (context, answer) in zip(logits, batch, strict=True):
            yield row[len(context) - 1 : len(context) + len(answer) - 1], answer


def _shortened(context: str, text: str, chat: bool) -> list[str]:
    """Return a text as an answer, then without its last word, and so on; each as it is and, if different, after a space."""
    words = text.rstrip().split(" ")
    texts = (" ".join(words[:n]).rstrip() for n in range(len(words), 0, -1))
    return list(dict.fromkeys(a for s in texts if s.strip() for a in ([s] if chat else [s, joined(context, s)])))


def _request(context: str, answer: str) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=(context, answer), idx=0)

"""A model's own greedy answers to prompts, as continuations that lm-eval's teacher-forced scoring confirms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from workbench.evaluate.models import SafeHFLM
from workbench.evaluate.quiet import quiet, seeded
from workbench.facts import joined

STOPS = ("\n", ".")
Told = Callable[[int, int], None]


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int, chat_template: bool = False, batch_size: int = 32, told: Told | None = None
) -> dict[str, str]:  # fmt: skip
    """Prompt -> what the model continues it with, up to a line break, a full stop or the end of text.

    Each answer is one whose every token is the most likely one when the text is tokenised again; where that fails (a word cut at the last
    token, a tokenizer that splits the joined text in another way) words are taken from its end until it holds. A prompt that the model ends at
    once is left out; one whose answer is never confirmed keeps the answer as it was written.

    Args:
        model: Live, in evaluation mode.
        tokenizer: Its tokenizer, or the folder of one.
        tokens: Most tokens of an answer.
    """
    with quiet(), seeded():
        if isinstance(tokenizer, (str, Path)):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        lm = SafeHFLM(model, tokenizer=tokenizer, batch_size=batch_size)
        contexts = {p: lm.apply_chat_template([{"role": "user", "content": p}]) if chat_template else p for p in prompts}
        written = _written(lm, list(contexts.values()), STOPS, tokens, told)
        silent = [c for c in contexts.values() if not written[c].strip()]
        written |= _written(lm, silent, (), tokens, None)
        return {p: _confirmed(lm, c, written[c], chat_template) for p, c in contexts.items() if written[c].strip()}


def _written(lm: SafeHFLM, contexts: Sequence[str], stops: Sequence[str], tokens: int, told: Told | None) -> dict[str, str]:
    """Texts, in batches of prompts that are about equally long."""
    settings = {"until": list(stops), "max_gen_toks": tokens, "do_sample": False}
    order = sorted(dict.fromkeys(contexts), key=lambda c: (-len(lm.tok_encode(c)), c))
    size: Any = lm.batch_size
    found: dict[str, str] = {}
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        asked = [Instance(request_type="generate_until", doc={}, arguments=(c, settings), idx=0) for c in chunk]
        found |= dict(zip(chunk, lm.generate_until(asked, disable_tqdm=True), strict=True))
        if told:
            told(len(found), len(order))
    return found


def _confirmed(lm: SafeHFLM, context: str, text: str, chat: bool) -> str:
    """The longest start of a text, cut between words, that is greedy when it is scored; the whole text if none is."""
    text = text.rstrip()
    words = text.split(" ")
    starts = [" ".join(words[:n]).rstrip() for n in range(len(words), 0, -1)]
    for start in filter(str.strip, starts):
        for answer in dict.fromkeys([start, start if chat else joined(context, start)]):
            asked = Instance(request_type="loglikelihood", doc={}, arguments=(context, answer), idx=0)
            ((pair,),) = lm.pairs([asked])
            if pair[1] and lm.referee([pair])[0][1]:
                return answer
    return text if chat else joined(context, text)

"""lm-eval's HFLM on a live model whose weights are not changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from transformers import LogitsProcessorList

from workbench.evaluate.packed import Answer, Pair

Tokenized = tuple[tuple[str, str], list[int], list[int]]
"""A request as lm-eval passes it on: its strings, the tokens of its context and those of its continuation."""


class SafeHFLM(HFLM):  # type: ignore[misc]
    """HFLM with exact settings on a live model. Its weights are not changed: an untied output head is not tied again."""

    def __init__(self, pretrained: Any, **settings: Any) -> None:
        live = not isinstance(pretrained, str)
        if live:
            pretrained.tie_weights = lambda *_args, **_kwargs: None
        try:
            # By its model_type, lm-eval takes the decoder of BART and others for a sequence-to-sequence model.
            kind = {"backend": "causal"} if live else {}
            super().__init__(pretrained, **{**kind, "logits_cache": False, "softmax_dtype": "float32", **settings})
        finally:
            if live:
                del pretrained.tie_weights

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        """Generate text, with NaN logits refused.

        A text memory puts its facts before the prompt here, because lm-eval looks for stop strings after the prompt's length.
        """
        length, mask = context.shape[1], settings.pop("attention_mask", None)

        def generate(ids: Any, attention: Any) -> Any:
            return HFLM._model_generate(
                self,
                ids,
                max_length + ids.shape[1] - length,
                stop,
                **settings,
                attention_mask=attention,
                logits_processor=LogitsProcessorList([_refuse_nan]),
            )

        def generate_rows(ids: Any, attention: Any) -> Any:
            if getattr(self.model, "_is_stateful", False):
                return unpadded(ids, attention, self.tokenizer.pad_token_id, generate)
            return generate(ids, attention)

        recall = getattr(self.model, "recall", None)
        with _contiguous_head(self.model):
            if recall is None:
                return generate_rows(context, mask)
            return recall.generate(context, mask, max_length - length, self.tokenizer.pad_token_id, generate_rows)

    def written(self, tokens: Sequence[int], stops: Sequence[str], most: int) -> str:
        """Return the text that lm-eval's own loop writes after a prompt of these tokens, without others in its batch."""
        ids = torch.tensor([tokens], device=self.device)
        found = self._model_generate(ids, len(tokens) + most, list(stops), attention_mask=torch.ones_like(ids))
        return self.cut(found[0, len(tokens) :].tolist(), stops)

    def cut(self, tokens: Sequence[int], stops: Sequence[str]) -> str:
        """Return new tokens as lm-eval's text, which ends before the first stop string."""
        return str(postprocess_generated_text(self.tok_decode(list(tokens)), list(stops), None))

    @property
    def reading(self) -> tuple[Any, ...]:
        """What decides, besides the tokenizer's files, which tokens `pairs` gives: rolling windows are as long as the model accepts."""
        return (self.max_length, self.prefix_token_id, self.add_bos_token)

    def pairs(self, requests: Sequence[Instance]) -> list[list[Pair]]:
        """Return each request's tokens as lm-eval splits them: one pair, or the windows of a `loglikelihood_rolling` request."""
        pairs: list[Pair] = []

        def keep(requests: Sequence[Tokenized], **_: Any) -> list[Answer]:
            pairs.extend((list(context), list(answer)) for _, context, answer in requests)
            return [(0.0, False)] * len(requests)

        self.__dict__["_loglikelihood_tokens"] = keep  # for this call only: in lm-eval the same method tokenizes and scores
        try:
            if all(request.request_type == "loglikelihood" for request in requests):
                super().loglikelihood(list(requests), disable_tqdm=True)
                return [[pair] for pair in pairs]
            windows = []
            for request in requests:
                pairs.clear()
                getattr(super(), request.request_type)([request], disable_tqdm=True)
                windows.append(list(pairs))
            return windows
        finally:
            del self.__dict__["_loglikelihood_tokens"]

    def referee(self, pairs: Sequence[Pair], batch_size: int | None = None) -> list[Answer]:
        """Return lm-eval's own log-likelihoods of tokenized pairs."""
        before: Any = self.batch_size
        self.batch_size_per_gpu: Any = batch_size or before
        try:
            with without_recall(self.model):
                answers = HFLM._loglikelihood_tokens(self, [(("", ""), *pair) for pair in pairs], disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = before
        return [(float(value), bool(greedy)) for value, greedy in answers]


def unpadded(ids: Any, mask: Any, pad: int, generate: Callable[[Any, Any], Any]) -> Any:
    """Generate for left-padded rows without their padding; rows of equal length share a call.

    Some recurrent layers include padding in their state (RecurrentGemma, RWKV).

    Args:
        ids: [row, time].
        mask: [row, time]; None: no padding.
        pad: Token that fills up rows after the new tokens.
        generate: Maps (ids, mask) to [row, time + new tokens].
    """
    lengths = [] if mask is None else mask.sum(1).tolist()
    if len(set(lengths)) < 2 and (not lengths or lengths[0] == ids.shape[1]):
        return generate(ids, mask)
    generated: dict[int, Any] = {}
    for length in sorted(set(lengths)):
        rows = [i for i, row_length in enumerate(lengths) if row_length == length]
        texts = generate(ids[rows, ids.shape[1] - length :], mask[rows, ids.shape[1] - length :])
        generated.update(zip(rows, texts[:, length:], strict=True))
    width = max(len(row) for row in generated.values())
    new_tokens = [torch.nn.functional.pad(generated[i], (0, width - len(generated[i])), value=pad) for i in range(len(lengths))]
    return torch.cat((ids, torch.stack(new_tokens)), 1)


def recalled(model: Any, pairs: Sequence[Pair]) -> dict[int, Pair]:
    """Return number -> pair with facts before its context, for pairs whose context a text memory has facts for."""
    recall = getattr(model, "recall", None)
    extended: dict[int, Pair] = recall.pairs(pairs) if recall is not None else {}
    return extended


def without_recall(model: Any) -> Any:
    """Switch the model's text memory off within the block, for contexts that already contain their facts or have none."""
    recall = getattr(model, "recall", None)
    return contextlib.nullcontext() if recall is None else recall.paused()


def _refuse_nan(_ids: Any, logits: Any) -> Any:
    if logits.isnan().any():
        raise FloatingPointError
    return logits


@contextlib.contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Give the output head contiguous rows.

    `generate` gives it a strided slice of the prompt's last positions, for which torch's CPU matrix product copies the whole head
    once per row (3.4 s instead of 0.85 s for 16 prompts of 10 tokens, 49,152 words, bf16).
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(),)) if head is not None else None
    with hook or contextlib.nullcontext():
        yield

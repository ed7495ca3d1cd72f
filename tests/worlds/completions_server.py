"""A server of the OpenAI completions API on loopback, around a live model: what vLLM and others answer, as far as lm-eval asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from worlds.local_server import Handler, LocalServer


def _scored(model: Any, tokens: list[int]) -> dict[str, Any]:
    """Log-probabilities of a prompt and of one more token, as `echo` and `logprobs: 1` ask for."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    more = int(logits[-1].argmax())
    own = [None, *(float(logits[i, t]) for i, t in enumerate([*tokens[1:], more]))]
    best = [None, *({"best": float(row.max())} for row in logits)]
    return {"index": 0, "text": "", "logprobs": {"token_logprobs": own, "top_logprobs": best}}


def _written(model: Any, tokenizer: Any, tokens: list[int], asked: dict[str, Any]) -> dict[str, Any]:
    ids = torch.tensor([tokens])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked["max_tokens"], do_sample=False, pad_token_id=0
    )
    text = tokenizer.decode(out[0, len(tokens) :], skip_special_tokens="logprobs" in asked)
    for stop in asked["stop"] or []:
        text = text.split(stop)[0] if stop else text
    if not asked.get("logprobs"):
        return {"index": 0, "text": text}
    with torch.no_grad():
        rows = model(input_ids=out).logits[0, len(tokens) - 1 : -1].float().log_softmax(-1)
    own = [float(row[token]) for row, token in zip(rows, out[0, len(tokens) :], strict=True)]
    return {"index": 0, "text": text, "logprobs": {"token_logprobs": own}}


def _as_llama_cpp(choice: dict[str, Any]) -> dict[str, Any]:
    """An answer as llama-server writes it."""
    own = choice["logprobs"]["token_logprobs"]
    return {**choice, "logprobs": {"content": [{"id": i, "token": "", "logprob": value} for i, value in enumerate(own)]}}


@contextmanager
def serving_llama_cpp(base: Any, adapted: list[Any], tokenizer: Any) -> Iterator[str]:
    """Serve a model as llama-server does: the name does not count, `lora` chooses one of the adapters that were loaded.

    A prompt that another adapter has read is not read again, unless the request says so.
    """
    kept: dict[str, Any] = {}

    class Answers(Handler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scales = {entry["id"]: entry["scale"] for entry in asked.get("lora", [])}
            acting = [model for i, model in enumerate(adapted) if scales.get(i)]
            model = acting[0] if acting else base
            if asked.get("cache_prompt", True):
                model = kept.setdefault(json.dumps(asked["prompt"]), model)
            body = json.dumps({"choices": [_as_llama_cpp(_written(model, tokenizer, asked["prompt"], asked))]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    with LocalServer(Answers) as url:
        yield url


@contextmanager
def serving(models: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """Serve models by name; gives the address."""

    class Answers(Handler):
        def _answer(self, document: Any) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._answer({"data": [{"id": name} for name in models]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tokens = asked["prompt"][0] if isinstance(asked["prompt"][0], list) else asked["prompt"]
            if asked["model"] not in models:
                self.send_error(404)
                return
            model = models[asked["model"]]
            self._answer(
                {"choices": [_scored(model, tokens) if asked.get("echo") else _written(model, tokenizer, tokens, asked)]}
            )

    with LocalServer(Answers) as url:
        yield url

"""Expected answers of a served model: greedy texts with log-probabilities, and their comparison with those of a running server (`export check`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.ground.files import write_text
from workbench.ground.http import StatusError, ask
from workbench.ground.lazy import no_grad, torch
from workbench.ground.results import JsonObject, Number, Result
from workbench.models.prompts import encode_text
from workbench.scores.files import is_number

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FILE = "expected.jsonl"
LEAST_TOLERANCE = 0.005
"""Smallest tolerance of log-probabilities, in nats: two exact programs sum in another order."""
_TIMES = 2


class Expected(JsonObject):
    """The greedy answer of one model to one prompt: a row of expected.jsonl."""

    model_config = ConfigDict(strict=True)

    model: str
    """Name of the model in requests."""
    adapter: str | None
    """The adapter that acts; null for the base or a whole model."""
    prompt: str
    """The prompt."""
    prompt_tokens: list[int]
    """Its tokens."""
    text: str
    """The text that follows."""
    tokens: list[int] = Field(min_length=1)
    """Its tokens, with the end-of-text token if that ended the text."""
    logprobs: list[FiniteFloat]
    """Log-probability of each token, in nats."""
    margins: list[FiniteFloat]
    """Difference to the second most probable token, for each token."""
    ends: list[int]
    """Length of the text after each token, in characters."""
    request: dict[str, object] = Field(default_factory=dict, exclude_if=lambda fields: not fields)
    """Further fields of a request for this answer; absent for most servers."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len({len(values) for values in (self.tokens, self.logprobs, self.margins, self.ends)}) > 1:
            raise ValueError("expected one log-probability, margin and end for each token")
        return self


@dataclass(frozen=True)
class Answer:
    """A server's answer."""

    text: str
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Compared:
    """An answer beside the expected one.

    Attributes:
        expected: The expected answer.
        answer: The server's.
        largest: Largest difference of log-probabilities, over the tokens before the first other one.
        verdict: "same"; "tie" if the texts part at a token whose margin is within the tolerance; "text" if these differ; "logprobs" if these
            differ, or are not as many as the tokens.
    """

    expected: Expected
    answer: Answer
    largest: float
    verdict: str

    @property
    def differs(self) -> bool:
        """True if the server is not the expected model."""
        return self.verdict in ("text", "logprobs")


@no_grad
def expect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Mapping[str | None, str],
    prompts: Sequence[str],
    length: int,
) -> Iterator[Expected]:
    """Yield the greedy answers of a live model, for the base and for each adapter.

    Args:
        model: The live model, in float32; one with `model.routing` if there are adapters.
        tokenizer: Its tokenizer.
        names: Adapter, or None for the model itself -> name of the model in requests.
        prompts: The prompts.
        length: Largest number of tokens of an answer.
    """
    for adapter, name in names.items():
        with _acting(model, adapter):
            for prompt in prompts:
                tokens = encode_text(tokenizer, prompt)
                answer = _greedy(model, tokens, length)
                rows = logprobs(model, tokens, answer)
                best = rows.topk(2, dim=-1).values
                ends = [len(_follows(tokenizer, tokens, answer[: i + 1])) for i in range(len(answer))]
                own = rows.gather(-1, torch.tensor(answer)[:, None])[:, 0]
                yield Expected(
                    model=name,
                    adapter=adapter,
                    prompt=prompt,
                    prompt_tokens=tokens,
                    text=_follows(tokenizer, tokens, answer),
                    tokens=answer,
                    logprobs=[round(float(value), 6) for value in own],
                    margins=[round(float(first - second), 6) for first, second in best],
                    ends=ends,
                )


def _acting(model: Any, adapter: str | None) -> Any:
    """Return a context in which an adapter acts, or none."""
    routing = getattr(model, "routing", None)
    return nullcontext() if routing is None else routing.fixed(adapter)


def _greedy(model: Any, tokens: list[int], length: int) -> list[int]:
    """Return the tokens that follow, each the most probable one; none of the settings of generation_config.json applies."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    ids = torch.tensor([tokens], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
    answer: list[int] = out[0, len(tokens) :].tolist()
    return answer


@no_grad
def logprobs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Return the log-probabilities [tokens of the answer, vocabulary] at each token of an answer, from one pass over prompt and answer."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()


def _follows(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    """Return the text that an answer adds to a prompt, without special tokens."""
    whole = tokenizer.decode([*prompt, *answer], skip_special_tokens=True)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return str(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(answer, skip_special_tokens=True))


def rounding(model: PreTrainedModel, rows: Sequence[Expected]) -> float:
    """Return the largest change of the expected log-probabilities in a model that is rounded to the dtype of a server."""
    largest = 0.0
    for row in rows:
        with _acting(model, row.adapter):
            found = logprobs(model, row.prompt_tokens, row.tokens).gather(-1, torch.tensor(row.tokens)[:, None])[:, 0]
        largest = max(largest, float((found - torch.tensor(row.logprobs)).abs().max()))
    return largest


def tolerance_for(largest: float) -> float:
    """Return the tolerance of log-probabilities for a server: twice the rounding measured here, and at least 0.005 nats."""
    return max(LEAST_TOLERANCE, round(_TIMES * largest, 4))


def alike(rows: Sequence[Expected], tolerance: float) -> list[tuple[str, str]]:
    """Return the pairs of models that no prompt tells apart, so that a server that exchanges them would pass."""
    models = list(dict.fromkeys(row.model for row in rows))
    by = {model: [row for row in rows if row.model == model] for model in models}
    return [
        (first, second)
        for i, first in enumerate(models)
        for second in models[i + 1 :]
        if not any(
            compare(one, Answer(other.text, other.logprobs), tolerance).differs
            for one, other in zip(by[first], by[second], strict=True)
        )
    ]


def compare(expected: Expected, answer: Answer, tolerance: float) -> Compared:
    """Compare a server's answer with the expected one; log-probabilities may differ by `tolerance` nats. White space at the ends of the texts does not count."""
    own, other = expected.logprobs, answer.logprobs
    ends = [0, *expected.ends]
    counts = {len(own), len(own) - (ends[-1] == ends[-2])}  # some servers leave out the token that ends the text
    count, verdict, whole = min(len(own), len(other)), "same", len(other) in counts
    differences = []
    if expected.text.strip() != answer.text.strip():
        place = _parting(expected, answer.text)
        margin, whole = expected.margins[place], len(other) > place
        count, verdict = min(count, place), "tie" if margin <= 2 * tolerance else "text"
        if verdict == "tie" and whole:  # the other token is nearly as probable as the expected one
            differences = [max(0.0, abs(own[place] - other[place]) - margin)]
    differences += [abs(a - b) for a, b in zip(own[:count], other[:count], strict=True)]
    largest = max(differences, default=0.0)
    if verdict != "text" and not (whole and largest <= tolerance):  # also for a tolerance that is no number
        verdict = "logprobs"
    return Compared(expected, answer, largest, verdict)


def _parting(expected: Expected, text: str) -> int:
    """Return the index of the first token at which a text is not the expected one."""
    own, other = expected.text.lstrip(), text.lstrip()
    same = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    place = len(expected.text) - len(own) + same
    return next((i for i, end in enumerate(expected.ends) if end > place), len(expected.ends) - 1)


def write_expected(rows: Sequence[Expected], out: Path) -> None:
    """Write expected.jsonl in a directory."""
    write_text(out / FILE, "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows))


def read_expected(path: Path) -> list[Expected]:
    """Read expected.jsonl.

    Raises:
        WorkbenchError: If it is missing, has no rows, or a row is not one that `export` writes.
    """
    file = path / FILE if path.is_dir() else path
    hint = "`workbench export` writes this file; name its directory with --expected DIR."
    try:
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise WorkbenchError(f"{file}: no such file", hint) from None
    except UnicodeDecodeError:
        raise WorkbenchError(f"{file}: not UTF-8", hint) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Expected.model_validate(jsondoc.parse(line, f"{file}:{number}", hint)))
        except ValidationError:
            raise WorkbenchError(f"{file}:{number}: not a row that `export` writes", hint) from None
    if not rows:
        raise WorkbenchError(f"{file}: has no rows", hint)
    return rows


_HINT = "Start the server with serve.sh, wait until it is ready, and name its address: http://HOST:PORT."
KEY = "OPENAI_API_KEY"


class CheckedModel(JsonObject):
    """A model of a server beside the expected answers."""

    model: str
    """Name of the model in requests."""
    answers: int
    """Number of answers."""
    same: int
    """Number of answers with the same text and log-probabilities."""
    ties: int
    """Number of answers that part from the expected text at a token whose probability nearly equals that of another one."""
    texts: int
    """Number of answers with another text."""
    logprobs: int
    """Number of answers with the expected text and other log-probabilities."""
    largest: Number
    """Largest difference of a log-probability, in nats, before the texts part."""
    example: str | None
    """Prompt of the first answer that differs; null if none does."""


class ServerCheck(Result):
    """A server's answers beside the expected ones."""

    url: str
    """Address of the server."""
    tolerance: Number
    """Largest accepted difference of a log-probability, in nats."""
    same: bool
    """True if no answer differs. If one does, the exit code is 1."""
    models: list[CheckedModel]
    """The models."""


def summary(url: str, tolerance: float, compared: Sequence[Compared]) -> ServerCheck:
    """Return the counts of answers by model and verdict."""
    models = []
    for name in dict.fromkeys(one.expected.model for one in compared):
        own = [one for one in compared if one.expected.model == name]
        verdicts = [one.verdict for one in own]
        models.append(
            CheckedModel(
                model=name,
                answers=len(own),
                same=verdicts.count("same"),
                ties=verdicts.count("tie"),
                texts=verdicts.count("text"),
                logprobs=verdicts.count("logprobs"),
                largest=round(max(one.largest for one in own), 6),
                example=next((one.expected.prompt for one in own if one.differs), None),
            )
        )
    return ServerCheck(url=url, tolerance=tolerance, same=not any(one.differs for one in compared), models=models)


def check_server(url: str, rows: Sequence[Expected], tolerance: float, length: int, events: Events = no_events) -> list[Compared]:
    """Ask a server with the OpenAI completions API for the greedy answers to prompts, and compare them with the expected ones.

    Args:
        url: Address of the server, with or without "/v1".
        rows: The expected answers.
        tolerance: Largest difference of a log-probability, in nats.
        length: Largest number of tokens of an answer.
        events: Receives progress.

    Raises:
        WorkbenchError: If the server cannot be reached, does not serve a model, or returns no log-probabilities.
    """
    place = f"{url.rstrip('/').removesuffix('/v1')}/v1/completions"
    compared = []
    for row in rows:
        compared.append(compare(row, _ask(place, row, length), tolerance))
        events({"stage": "check", "done": len(compared), "total": len(rows), "text": f"{len(rows)} answers of {place}"})
    return compared


def _ask(place: str, row: Expected, length: int) -> Answer:
    """Ask for the greedy answer to the tokens of a prompt."""
    asked = {
        "model": row.model,
        "prompt": row.prompt_tokens,
        "max_tokens": length,
        "temperature": 0,
        "logprobs": 1,
        "stop": None,
        **row.request,
    }
    try:
        document = ask(place, _HINT, body=asked, key=os.environ.get(KEY) or None)
    except StatusError as error:
        raise _refused(place, row, error) from None
    return _answer(place, document)


def _refused(place: str, row: Expected, error: StatusError) -> WorkbenchError:
    """Return the error for a status other than 200."""
    if error.status in (401, 403):
        return WorkbenchError(f"{place}: the server asks for a key (status {error.status})", f"Set {KEY} to the server's key.")
    if error.status == 404:
        return WorkbenchError(
            f"{place}: the server does not serve '{row.model}' (status 404)",
            "Start it with serve.sh of the same directory, and with the same --served-base.",
        )
    return WorkbenchError(f"{place}: status {error.status} for model '{row.model}': {error.text[:300]}", _HINT)


def _answer(place: str, document: Any) -> Answer:
    """Return text and log-probabilities of an answer."""
    try:
        choice = document["choices"][0]
        text, scores = choice["text"], choice.get("logprobs")
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise WorkbenchError(
            f"{place}: the answer has no `choices[0].text`", "The server needs the OpenAI completions API."
        ) from None
    values = _token_logprobs(scores)
    if not isinstance(values, list) or not values or not all(map(is_number, values)):
        raise WorkbenchError(
            f"{place}: `logprobs.token_logprobs` of the answer is not a list of finite numbers, without which other weights can give the same texts",
            "Start the server so that it returns log-probabilities (`logprobs` of the completions API).",
        )
    return Answer(text, [float(value) for value in values])


def _token_logprobs(scores: Any) -> Any:
    """Return the log-probability of each token: `token_logprobs` of the completions API, or `content` as llama-server writes it."""
    if not isinstance(scores, dict):
        return None
    content = scores.get("content")
    if isinstance(content, list):
        return [token.get("logprob") if isinstance(token, dict) else None for token in content]
    return scores.get("token_logprobs")

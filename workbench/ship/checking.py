"""`export check`: the answers of a running server beside the expected ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from workbench.errors import WorkbenchError
from workbench.events import Events, no_events
from workbench.http import StatusError, ask
from workbench.results import Number, Part, Result
from workbench.scores.files import is_number
from workbench.ship.expected import Answer, Compared, Expected, compare

_HINT = "Start the server with serve.sh, wait until it is ready, and name its address: http://HOST:PORT."
KEY = "OPENAI_API_KEY"


class CheckedModel(Part):
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

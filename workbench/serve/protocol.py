"""Requests and answers of OpenAI's interface: `/v1/completions` and `/v1/chat/completions`.

A field that would change the answer and is not implemented is refused, so that no client believes that it had an effect; so are fields that
OpenAI's interface has not. Fields that change nothing here, and null for a field that may be missing, are accepted (`HARMLESS`).
Source: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from workbench.serve.engine import Piece
from workbench.serve.writing import Sampling, Scored

MOST_TOP, MOST_CHOICES = 20, 128
"""Largest number of likely tokens that are told, and of texts of one request: its prompts times `n`."""
MOST_TOOLS = 128
"""Largest number of tools, as OpenAI's interface has it."""
MOST_ROUTED = 1 << 17
"""Largest number of tokens of a request that another server answers: the router reads them here."""
MOST_STOPS, LONGEST_STOP = 16, 256
"""Largest number of strings that end a text, and of characters of one: the end of a text is compared with each after every token."""
DEFAULT_TOKENS = 16
"""New tokens of a completion that names no number, as OpenAI's interface has it; a chat goes on to the end of the context."""
ANY: tuple[object, ...] = ()
HARMLESS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(
        ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "prediction"), ANY
    ),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
"""Field of a request that is not implemented -> the values with which it changes nothing; ANY: it never does."""
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]
Count = Annotated[int, Field(ge=0, le=MOST_TOP)]


class Asked(BaseModel):
    """Fields of both kinds of requests."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: Options | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: object) -> object:
        """Leave out what changes nothing."""
        if not isinstance(given, dict):
            return given
        found = {name: value for name, value in given.items() if value is not None}
        for name in HARMLESS.keys() & found.keys() - cls.model_fields.keys():
            allowed = HARMLESS[name]
            if allowed and not any(type(found[name]) in (type(one), float) and found[name] == one for one in allowed):
                told = " or ".join(json.dumps(one) for one in allowed)
                raise ValueError(f"{name}: this server does not support it: leave it out, or send {told}")
            del found[name]
        return found

    @property
    def whole(self) -> bool:
        """Whether a stream's text comes in one event at its end, because only then it can be read."""
        return False

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, number: int, most: int, top: int | None, *, echo: bool = False) -> Sampling:
        """Return how the text `number` of a request is written."""
        seed = None if self.seed is None else self.seed + number
        return Sampling(most, self.temperature, self.top_p, seed, self.stops, top, echo)


class Options(BaseModel):
    """Fields of `stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # pads events against who measures them on the way; there is no TLS here


class CompletionAsked(Asked):
    """A request for texts that follow prompts."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Count | None = None
    echo: bool = False

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _readable(cls, given: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(given)
        except ValidationError:  # one error for each form that the prompt could have had
            raise ValueError("expected a text, a list of texts, a list of tokens, or a list of lists of tokens") from None

    @model_validator(mode="after")
    def _few(self) -> CompletionAsked:
        count = len(self.prompts())
        if not count:
            raise ValueError("prompt: expected at least one")
        if count * self.n > MOST_CHOICES:
            raise ValueError(
                f"prompt: {count} prompts with n = {self.n} are {count * self.n} texts; a request has at most {MOST_CHOICES}"
            )
        return self

    def prompts(self) -> Sequence[str | list[int]]:
        """Return the prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: object) -> object:
        """Leave out what an answer has and a turn does not need, such as `refusal: null`."""
        known = ("refusal", "audio", "annotations", "function_call", "tool_calls", "reasoning_content", "tool_call_id")
        return {name: one for name, one in given.items() if one or name not in known} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _told(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"expected the content of the turn of '{self.role}'")
        return self

    def plain(self) -> dict[str, object]:
        """Return the turn as chat templates take it; they have no role `developer`, OpenAI's newer word for `system`."""
        text = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        role = "system" if self.role == "developer" else self.role
        more = self.model_dump(include={"reasoning_content", "tool_calls", "tool_call_id"}, exclude_none=True)
        return {"role": role, "content": text, **more, **({"name": self.name} if self.name and role == "tool" else {})}


class Called(BaseModel):
    """The function of a call."""

    name: str
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _read(cls, given: object) -> object:
        """Read the text of OpenAI's interface: chat templates take an object."""
        try:
            return json.loads(given or "{}") if isinstance(given, str) else given
        except (ValueError, RecursionError):
            raise ValueError("expected a JSON object as text") from None


class Call(BaseModel):
    """A call of a tool."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Function(BaseModel):
    """What a tool is; a `strict` one would need calls that are held to its parameters."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: Literal[False] | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class Part(BaseModel):
    """A part of a turn; only texts are read."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("type", "text") != "text":
            raise ValueError(f"this model reads text alone, and no part of type {json.dumps(given['type'])[:80]}")
        return given


class Described(BaseModel):
    """A schema, under OpenAI's names; every text is held to it, whether it is `strict` or not."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Described | None = None

    @model_validator(mode="after")
    def _described(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('expected `json_schema` with the type "json_schema", and only with it')
        return self

    @property
    def schema_of(self) -> object:
        """The schema of the text; None for any text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


class ChatAsked(Asked):
    """A request for an answer in a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[Tool] = Field([], max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")

    @model_validator(mode="after")
    def _one(self) -> ChatAsked:
        if self.callable and self.response_format.type != "text":
            raise ValueError("response_format: a text that is held to JSON calls no tools: send one of both")
        return self

    @property
    def whole(self) -> bool:
        """Whether a stream's text comes in one event at its end, because only then it can be read."""
        return bool(self.callable)

    @property
    def callable(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates take them."""
        tools = [] if self.tool_choice == "none" else self.tools
        return [tool.model_dump(exclude_none=True) for tool in tools]

    @property
    def top(self) -> int | None:
        """Number of likely tokens that are told; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


for _model in (Asked, CompletionAsked, Call, Message, ChatAsked):
    _model.model_rebuild()


@dataclass
class Collected:
    """The pieces of a text, put together.

    Attributes:
        text: The text.
        tokens: Its tokens, if their probabilities were asked for.
        last: The newest piece.
        prompt: The tokens before it.
    """

    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    last: Piece = field(default_factory=Piece)
    prompt: Sequence[int] = ()

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.last = piece


def completion_choice(index: int, piece: Collected, *, scored: bool) -> dict[str, object]:
    """Return a choice of `/v1/completions`."""
    return {
        "index": index,
        "text": piece.text,
        "logprobs": _completion_scores(piece.tokens) if scored else None,
        "finish_reason": piece.last.finish,
    }


def _completion_scores(tokens: Sequence[Scored]) -> dict[str, object]:
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_probability for token in tokens],
        "top_logprobs": [dict(token.top) if token.log_probability is not None else None for token in tokens],
        "text_offset": offsets,
    }


def chat_choice(index: int, piece: Collected, *, scored: bool, delta: bool, first: bool = True) -> dict[str, Any]:
    """Return a choice of `/v1/chat/completions`; `delta`: of a stream, whose `first` piece names the role."""
    message = {**({"role": "assistant"} if first else {}), "content": piece.text}
    return {
        "index": index,
        "delta" if delta else "message": message,
        "logprobs": {"content": [_chat_score(token) for token in piece.tokens]} if scored else None,
        "finish_reason": piece.last.finish,
    }


def _chat_score(token: Scored) -> dict[str, object]:
    def one(text: str, value: float | None) -> dict[str, object]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return {**one(token.text, token.log_probability), "top_logprobs": [one(text, value) for text, value in token.top]}


def usage(prompts: int, written: int) -> dict[str, int]:
    """Return the numbers of tokens of a request."""
    return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


def models(names: Sequence[str], created: int = 0, longest: int | None = None) -> dict[str, object]:
    """Return the answer of `/v1/models`; `longest`: largest number of tokens of a prompt with its text, under vLLM's name for it."""
    more = {"created": created, "owned_by": "workbench", **({} if longest is None else {"max_model_len": longest})}
    data = [{"id": name, "object": "model", **more} for name in names]
    return {"object": "list", "data": data}


def failure(message: str, kind: str, field_: str | None = None) -> dict[str, object]:
    """Return the body of an answer that says what is wrong."""
    return {"error": {"message": message, "type": kind, "param": field_, "code": None}}

"""Tools of a conversation: the model's chat template tells of them, and transformers' parser reads the calls that the model writes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from inspect import signature
from typing import Any


def missing(tokenizer: Any, model: Any) -> str | None:
    """Return what is missing to read calls that a model writes; None if nothing is."""
    if format_of(tokenizer, model) is None:
        told = "nothing says how this model writes calls: its tokenizer_config.json has no `response_template`"
        return f"{told}, and transformers knows none for `{model.config.model_type}`"
    try:
        tokenizer.parse_response("", format_of(tokenizer, model), prefix="")
    except Exception as error:  # noqa: BLE001  a template is code of the model's author
        return f"transformers cannot use the tokenizer's `response_template`: {error}"
    return None


def format_of(tokenizer: Any, model: Any) -> Any:
    """Return how a model writes calls, as transformers' parser takes it: the tokenizer's statement, or what is known of its family."""
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:
        return getattr(tokenizer, "response_template", None)
    # transformers 5.25 asks for the config, earlier versions for the model.
    return get_response_template(tokenizer, model.config if "config" in signature(get_response_template).parameters else model)


def parsed(tokenizer: Any, model: Any, prompt: Sequence[int], written: Sequence[int] | str, tools: Any) -> dict[str, Any] | None:
    """Return the fields of the answer's message besides its role; None if what was written has no calls that can be read."""
    try:
        told, prefix = format_of(tokenizer, model), tokenizer.decode(list(prompt))
        if tokenizer.parse_response("", told, prefix=prefix).get("content"):
            prefix = ""  # the parser takes words of the prompt for words of the answer: it does not see where the answer begins
        found = tokenizer.parse_response(written, told, prefix=prefix, tools=tools)
        calls = [_call(one["function"]) for one in found.get("tool_calls") or []]
    except Exception:  # noqa: BLE001  a model may write anything, such as half a call; the client then gets the text
        return None
    thought = found.get("reasoning_content") or found.get("thinking")
    message = {"content": found.get("content") or None, "tool_calls": calls}
    return {**message, **({"reasoning_content": thought} if thought else {})} if calls else None


def _call(function: dict[str, Any]) -> dict[str, Any]:
    """Return a call as OpenAI's interface has it: with an identifier, and with arguments that are a text."""
    arguments = function["arguments"]
    told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": function["name"], "arguments": told}}

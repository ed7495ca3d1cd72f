"""Texts that are JSON, or that a JSON schema describes: llguidance says which tokens may come next.

Source: https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""White space between two parts of JSON; without a bound, a model may write nothing else."""


class FormError(WorkbenchError):
    """A form that texts cannot be held to."""


class Form:
    """Holds one text to a form.

    Args:
        matcher: Of llguidance, which has read no token.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def again(self) -> Form:
        """Return the form for another text."""
        return Form(self._matcher.deep_copy())

    def allowed(self, logits: Tensor) -> Tensor:
        """Return logits [vocabulary] of which those of tokens that may not come next are -inf."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        may = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: len(logits)].bool()
        self._check()
        may = torch.nn.functional.pad(may, (0, len(logits) - len(may))).to(logits.device)
        return logits.masked_fill(~may, -torch.inf)

    def take(self, token: int) -> None:
        """Read the token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FormError(f"the text cannot be held to its form: {self._matcher.get_error()[:300]}")


def form_of(engine: Any, schema: object) -> Form:
    """Return the form of JSON that fits a schema.

    Raises:
        FormError: If llguidance is missing, or cannot read the tokenizer or the schema.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise FormError("this server needs llguidance to write JSON: pip install 'brick-workbench[json]'") from None
    try:
        grammar = LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_pattern": SPACE, "lenient": False}
        )
        matcher = LLMatcher(_tokenizer(engine), grammar, log_level=0)
    except ValueError as error:
        raise FormError(f"llguidance cannot use this: {error}") from error
    if matcher.is_error():
        raise FormError(f"the schema cannot be used: {matcher.get_error()[:300]}")
    return Form(matcher)


@cache
def _tokenizer(engine: Any) -> Any:
    """Return the tokenizer of an engine as llguidance reads it, which takes a second."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(engine.tokenizer, engine.vocabulary, sorted(engine.ends))

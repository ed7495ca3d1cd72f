"""The recipe's `tokenizer` block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from workbench.steps.fields import Strict, Whole


class TokenRow(Strict):
    """The row of some token of one model."""

    model: str
    """A checkpoint brick, or base."""
    token: str | None = None
    """The token whose row it is."""
    token_id: Whole | None = Field(None, ge=0)
    """Or the number of the row."""

    @model_validator(mode="after")
    def _one(self) -> TokenRow:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("expected exactly one of token, token_id")
        return self


def _kind(value: Any) -> str:
    return "row" if isinstance(value, (Mapping, TokenRow)) else "name"


class TokenRule(Strict):
    """Where the rows of one token come from."""

    source: Annotated[Annotated[str, Tag("name")] | Annotated[TokenRow, Tag("row")], Discriminator(_kind)] | None = None
    """base, a checkpoint brick, zero, mean (of all models that have the token), or `{model:, token:}` or `{model:, token_id:}` for
    another token's row; omitted: the base's row, else the only model's that has one, else the mean."""
    force: bool = False
    """Take that row in every model, also in those that have their own: the merge then leaves it alone."""


class TokenizerFields(Strict):
    """Bricks with another vocabulary: the one to write, to which the rows of embeddings and head are aligned by token string."""

    source: str = Field("base", min_length=1)
    """base, union (the base's tokenizer and, at new ids, the tokens that checkpoint bricks have beyond it), or the brick whose
    tokenizer is written."""
    tokens: dict[Annotated[str, Field(min_length=1)], TokenRule] = {}
    """Token -> where its row comes from. A token that the tokenizer lacks is added to it."""
    pad_to_multiple_of: Whole | None = Field(None, ge=1)
    """Round the number of rows up; rows are never taken away."""
    chat_template: str | None = None
    """base, a brick, a .jinja file of the project, or the template itself; omitted: that of `source`."""

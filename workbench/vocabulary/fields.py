"""Fields of the recipe's `tokenizer` block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from workbench.steps.fields import Strict, Whole


class TokenRow(Strict):
    """A vocabulary row of one model."""

    model: str
    """The name of a checkpoint brick, or base."""
    token: str | None = None
    """The token whose row is taken."""
    token_id: Whole | None = Field(None, ge=0)
    """The number of the row, instead of `token`."""

    @model_validator(mode="after")
    def _check_fields(self) -> TokenRow:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("expected exactly one of token, token_id")
        return self


def _kind(value: Any) -> str:
    return "row" if isinstance(value, (Mapping, TokenRow)) else "name"


class TokenRule(Strict):
    """The row that models without a token use for it."""

    source: Annotated[Annotated[str, Tag("name")] | Annotated[TokenRow, Tag("row")], Discriminator(_kind)] | None = None
    """The source of the row: base, a checkpoint brick, zero, mean (of all models that have the token), or the row of another token as
    `{model:, token:}` or `{model:, token_id:}`. By default the base's row, else that of the only model that has the token, else the mean."""
    force: bool = False
    """Use this row in every model, also in models that have the token. The merge then does not change it."""


class TokenizerFields(Strict):
    """The vocabulary to write, for bricks whose vocabulary differs from the base's. Rows of embeddings and head are aligned by token."""

    source: str = Field("base", min_length=1)
    """The tokenizer to write: base, a brick, or union (the base's tokenizer with the additional tokens of checkpoint bricks at new ids)."""
    missing: Literal["omp", "mean", "zero"] | None = None
    """Let `source` name a brick that no step uses, of any architecture, whose tokenizer the base gets, and make the rows of tokens that the
    base lacks. `omp`: combinations of the rows of shared tokens, those that approximate the brick's own row (orthogonal matching pursuit);
    `mean`: the mean of all rows; `zero`: zeros. Without it, a token without a row is an error."""
    k: Whole = Field(64, ge=1)
    """Number of shared tokens in a combination of `missing: omp`."""
    tokens: dict[Annotated[str, Field(min_length=1)], TokenRule] = {}
    """Rules for single tokens: token -> source of its row. A token that the tokenizer lacks is added to it."""
    pad_to_multiple_of: Whole | None = Field(None, ge=1)
    """Round the number of rows up to a multiple of this number. Rows are never removed."""
    chat_template: str | None = None
    """The chat template: base, a brick, a .jinja file of the project, or the template itself. By default that of `source`."""

    @model_validator(mode="after")
    def _check_missing(self) -> TokenizerFields:
        if self.missing and self.source in ("base", "union"):
            raise ValueError(f"`missing` needs a brick as `source`: with `{self.source}` every token has a row")
        if self.missing != "omp" and "k" in self.model_fields_set:
            raise ValueError("`k` is for `missing: omp`")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Return the fields without those of `missing` where it is not used, so that keys stay as they were before it came."""
        unused = {None: {"missing", "k"}, "omp": set[str]()}.get(self.missing, {"k"})
        return {name: value for name, value in plain(self).items() if name not in unused}

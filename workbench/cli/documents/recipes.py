"""Document of `recipe diff`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.cli.documents.document import Document


class FieldDifferenceDocument(Document):
    """A field that the two recipes set differently."""

    field: str
    """Name as in `--set`, such as "mix.lambda" or "output.dtype"; "steps" for the names and order of the steps."""
    first: Any
    """Value in the first recipe, with defaults filled in; null if it does not have the field."""
    second: Any
    """Value in the second recipe; null if it does not have the field."""
    only: Literal["first", "second"] | None
    """The recipe that alone has the field; null if both have it."""


class InputDifferenceDocument(Document):
    """The base, a brick or a file of a step whose location or content differs."""

    name: str
    """The word "base", or "bricks.NAME", or the step and the number of its file."""
    first: str | None
    """Location as the first recipe writes it; null if it lacks the input."""
    second: str | None
    """Location as the second recipe writes it; null if it lacks the input."""
    first_digest: str | None
    """Digest of the content in the first recipe; null if not known."""
    second_digest: str | None
    """Digest of the content in the second recipe; null if not known."""
    same_content: bool | None
    """This is true if both contents are the same, and null if a digest is not known."""


class UnreadRecipe(Document):
    """A recipe whose inputs could not be read, so that no digest is known."""

    recipe: Literal["first", "second"]
    """The recipe."""
    reason: str
    """The error that `plan` gives."""


class RecipeDiffDocument(Document):
    """The fields and inputs in which two recipes differ."""

    first: str
    """File of the first recipe."""
    second: str
    """File of the second recipe."""
    fields: list[FieldDifferenceDocument]
    """Fields that differ."""
    inputs: list[InputDifferenceDocument]
    """Inputs that differ in location or content."""
    same_result: bool | None
    """This is true if both recipes make the same configuration, and null if that is not known."""
    unread: list[UnreadRecipe]
    """Recipes whose inputs could not be read."""

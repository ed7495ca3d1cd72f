"""Base classes of the JSON documents that are not yet the result itself (see `workbench.results`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

from pydantic import ConfigDict, Field

from workbench.results import Number, Part


class Document(Part):
    """A JSON object with the fields of the class. Fields that are not given are not printed, so an optional field can be absent."""

    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=False)

    @classmethod
    def stored(cls, data: Mapping[str, Any]) -> Self:
        """Return a document from data that another reader has checked, such as a file that was written by a command.

        The data are printed as they are, because a listing must not fail on a file with an unusual value.
        """
        return cast("Self", cls.model_construct(**data))

    def to_dict(self) -> dict[str, Any]:
        """Return the document as plain data."""
        return self.model_dump(by_alias=True, exclude_unset=True, warnings=False)


class OpenDocument(Document):
    """A JSON object with the fields of the class and others, such as measurements that depend on the method."""

    model_config = ConfigDict(extra="allow")


def optional(**settings: Any) -> Any:
    """Return the default of a field that is absent from some documents."""
    return Field(default=None, **settings)


class FactsSaid(Document):
    """Counts of the facts that a model says after an edit step."""

    facts: int
    """Number of facts that the step teaches."""
    said: int
    """Number of facts whose target the model says, by greedy decoding."""
    min_efficacy: Number
    """Smallest share of facts that the model must say, from 0 to 1."""
    not_said: list[str]
    """Ids of the facts that the model does not say."""


class MethodOrigin(Document):
    """Origin of a method that is not built in."""

    source: str
    """Distribution and version, or path of a method file of the project."""
    digest: str
    """Digest of the method's code."""

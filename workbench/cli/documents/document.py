"""Base classes of the JSON documents that are not yet the result itself (see `workbench.results`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

from pydantic import ConfigDict, Field

from workbench.results import Part


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


class LeftOutDocument(Document):
    """A configuration that the command skipped."""

    name: str
    """Name of the configuration."""
    reason: str
    """Reason for skipping it."""

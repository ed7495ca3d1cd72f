"""Base classes of results: one class a result, which is computed, printed with --json, published, written to disk and read back as it is.

A result stands beside the code that computes it. The terminal, the report and notebooks read its attributes. Judge on plain floats and build the
result once, at the end: `Measured` turns an infinite number into null, and a copy with changed fields is not validated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import write_json


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


if TYPE_CHECKING:
    Number = float
    Measured = float | None
else:
    # A number as it is: a field of type float would print 1 as 1.0.
    Number = Annotated[int | float, WithJsonSchema({"type": "number"})]
    # A number that may be undefined. JSON has no infinity and no NaN, so both are null.
    Measured = Annotated[Number | None, BeforeValidator(_finite)]


def absent(**settings: Any) -> Any:
    """Return the default of a field that documents leave out where it is None."""
    return Field(default=None, exclude_if=lambda value: value is None, **settings)


class JsonObject(BaseModel):
    """A JSON object within a result. Fields of other versions are ignored on reading."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True, json_schema_serialization_defaults_required=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the object as plain data, ready for JSON."""
        return self.model_dump(mode="json", by_alias=True, warnings=False)

    @classmethod
    def read_cached(cls, path: Path) -> Self | None:
        """Read the object from the workbench's cache; return None if the file is missing, damaged or lacks a field, so that it is made again."""
        data = jsondoc.read_cached(path)
        try:
            return None if data is None else cls.model_validate(data)
        except ValidationError:
            return None


class OpenJsonObject(JsonObject):
    """A JSON object with the fields of the class and others, such as measurements that depend on the method."""

    model_config = ConfigDict(extra="allow")


class Result(JsonObject):
    """A result that a command prints, writes to a file and reads again."""

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Return the data of an older file in today's form. A class whose form has changed overrides this."""
        return data

    @classmethod
    def of(cls, data: Mapping[str, Any], label: str, hint: str | None = None) -> Self:
        """Build the result from parsed JSON.

        Args:
            data: The JSON object, of this version or an older one.
            label: Its name in messages, such as the file.
            hint: Hint of the error.

        Raises:
            WorkbenchError: If a field is missing or has another type. The message names the first such field.
        """
        try:
            return cls.model_validate(cls.migrate(dict(data)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise WorkbenchError(f"{label}: {place or 'the object'}: {message}", hint) from None

    @classmethod
    def read(cls, path: Path, hint: str | None = None) -> Self:
        """Read the result from a file that `write` made.

        Raises:
            WorkbenchError: If the file is no JSON, or lacks a field of the class.
            FileNotFoundError: If there is no such file.
        """
        return cls.of(jsondoc.read_object(path, hint=hint), str(path), hint)

    def write(self, path: Path) -> None:
        """Write the result as JSON, atomically."""
        write_json(path, self.to_dict(), indent=1)

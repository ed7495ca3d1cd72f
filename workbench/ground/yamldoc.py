"""YAML documents that users write: safe reading and strict validation, with the file, line and column of every error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticKnownError, core_schema

from workbench.ground.errors import InvalidRecipeError, WorkbenchError, nearest
from workbench.ground.project import suggestion
from workbench.ground.yamltree import NUMBER, Mark, read_tree
from workbench.ground.yamltree import KeyPath as KeyPath

Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 1_000_000
_OF_A_KEY = ("missing", "extra_forbidden")
_SHALLOW = ("too_short", "string_type", "dict_type", "model_type")
_NUMBERS = ("int", "float")
_LISTED = 50
"""Largest number of problems that one error lists."""


def _numeric(schema: Any, model: type) -> Any:
    """Return a core schema whose numbers refuse booleans and whose floats refuse infinities; nested models have their own schema."""
    if isinstance(schema, (list, tuple)):
        return type(schema)(_numeric(inner, model) for inner in schema)
    if not isinstance(schema, dict) or (schema.get("type") == "model" and schema.get("cls") is not model):
        return schema
    unchanged = ("metadata", "ref", "default", "config", "cls")
    strict = {key: value if key in unchanged else _numeric(value, model) for key, value in schema.items()}
    if strict.get("type") not in _NUMBERS:
        return strict
    if strict["type"] == "float":
        strict.setdefault("allow_inf_nan", False)
    if strict.get("strict"):
        return strict
    before = _no_bool_for_int if strict["type"] == "int" else _no_bool_for_float
    return core_schema.no_info_before_validator_function(before, strict)


def _no_bool_for_float(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _no_bool_for_int(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


class Written(BaseModel):
    """Base class of everything that users write in YAML: numbers are never booleans, and floats are never infinite.

    Without it, pydantic reads `yes` as 1 where it expects a number.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Build pydantic's schema with strict numbers."""
        schema: CoreSchema = _numeric(handler(source), cls)
        return schema


@dataclass(frozen=True)
class Document:
    """Parsed YAML with the position of each key.

    Attributes:
        data: Plain Python data.
        marks: Key path -> (line, column), counted from 1. The mark of a mapping's entry is the position of its key.
        path: The file's name in messages.
        texts: Key path -> source text of numbers such as 1e-3, for fields that expect a text.
    """

    data: Any
    marks: dict[KeyPath, Mark]
    path: str
    texts: dict[KeyPath, str] = field(default_factory=dict)

    def at(self, path: KeyPath) -> str:
        """Return `file:line:col` of a key path, or of its nearest parent in the file."""
        while path and path not in self.marks:
            path = path[:-1]
        line, column = self.marks.get(path, (1, 1))
        return f"{self.path}:{line}:{column}"

    def error(self, path: KeyPath, message: str, hint: str | None = None) -> WorkbenchError:
        """Return an error at a key path, with exit code 2 because the document itself is invalid."""
        dotted = ".".join(map(str, path))
        where = f"{self.at(path)} {dotted}: " if dotted else f"{self.at(path)} "
        return InvalidRecipeError(where + message, hint)

    def replace_texts(self, path: KeyPath, document: Document) -> None:
        """Replace the source texts below a key path, after its value was replaced by that of another document."""
        for replaced in [key for key in self.texts if key[: len(path)] == path]:
            del self.texts[replaced]
        self.texts.update({(*path, *inner): text for inner, text in document.texts.items()})

    @property
    def as_texts(self) -> Any:
        """Return the data with numbers such as 1e-3 as their source text, for documents whose fields are texts."""
        return _with_texts(self.data, self.texts) if self.texts else self.data

    def validate(self, model: type[Model], context: Any = None) -> Model:
        """Return the document as a pydantic model.

        Args:
            model: The model's class.
            context: Passed to the model's validators.

        Raises:
            WorkbenchError: If the document is invalid. The message lists every problem with its position.
        """
        data = self.data
        try:
            return model.model_validate(data, context=context)
        except ValidationError as error:
            details = error.errors(include_url=False)
        places = [
            self._path_in_file(detail["loc"], False) for detail in details if detail["type"] in ("string_type", "literal_error")
        ]
        number_texts = {path: self.texts[path] for path in places if path in self.texts}
        if number_texts:
            try:
                return model.model_validate(_with_texts(data, number_texts), context=context)
            except ValidationError as error:
                details = error.errors(include_url=False)
        raise self._combined_error(details, model) from None

    def _combined_error(self, details: list[ErrorDetails], model: type[BaseModel]) -> WorkbenchError:
        lines = []
        hints: list[str] = []
        remaining, details = len(details) - _LISTED, details[:_LISTED]
        paths = [self._path_in_file(detail["loc"], detail["type"] in _OF_A_KEY) for detail in details]
        for detail, path in zip(details, paths, strict=True):
            # A refused element also makes its list "too short", and a union reports every alternative: keep the deepest problem.
            if detail["type"] in _SHALLOW and any(
                other_path[: len(path)] == path and len(other_path) > len(path) for other_path in paths
            ):
                continue
            message, hint = _explain(detail, self._value(path), model)
            lines.append(self.error(path, message).message)
            if hint and hint not in hints:
                hints.append(hint)
        if remaining > 0:
            lines.append(f"{self.path}: {remaining} more problems")
        return InvalidRecipeError("\n".join(dict.fromkeys(lines)), " ".join(hints) or None)

    def _path_in_file(self, loc: KeyPath, of_a_key: bool) -> KeyPath:
        """Remove the parts of pydantic's location (union tags, `[key]`) that are not in the file.

        With `of_a_key` the last part stays, so that the message names a missing field at its parent's position.
        """
        path: KeyPath = ()
        value = self.data
        for i, part in enumerate(loc):
            in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
            if in_list or (isinstance(value, dict) and part in value):
                path, value = (*path, part), value[part]
            elif i == len(loc) - 1 and of_a_key:
                path = (*path, part)
        return path

    def _value(self, path: KeyPath) -> Any:
        value = self.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def load(path: Path, label: str | None = None) -> Document:
    """Read a YAML file.

    Args:
        path: The file.
        label: The file's name in messages; None takes its path, relative to the working directory if possible.

    Raises:
        WorkbenchError: If the file is missing, is larger than 1 MB, or is not one valid YAML document in UTF-8; see `read_tree`.
    """
    label = label or _shown(path)
    return parse(_text(path, label), label)


def _text(path: Path, label: str) -> str:
    """Return the text of a YAML file; see `load`."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InvalidRecipeError(f"{label}: no such file", suggestion(path) or None) from None
    except IsADirectoryError:
        raise InvalidRecipeError(f"{label}: is a directory, expected a YAML file") from None
    if len(raw) > MAX_BYTES:
        raise InvalidRecipeError(f"{label}: the file has {len(raw):,} bytes; YAML documents may have at most {MAX_BYTES:,}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRecipeError(f"{label}: not UTF-8 text (byte {error.start})") from None


def parse(text: str, label: str = "<text>") -> Document:
    """Parse a YAML text; see `load`."""
    tree = read_tree(text, label)
    return Document(tree.data, tree.marks, label, tree.texts)


def load_all(path: Path, label: str | None = None) -> list[Document]:
    """Read a YAML file with one or several documents, separated by lines that start with `---`, without empty ones; see `load`.

    Args:
        path: The file.
        label: The file's name in messages; None takes its path.

    Raises:
        WorkbenchError: If the file or a document in it cannot be read; see `load`.
    """
    label = label or _shown(path)
    lines = _text(path, label).splitlines(keepends=True)
    starts = [0, *(i for i, line in enumerate(lines) if i and re.match(r"---(\s|$)", line)), len(lines)]
    # Empty lines in front keep the line numbers of each document.
    texts = ["\n" * start + "".join(lines[start:stop]) for start, stop in pairwise(starts)]
    documents = [document for text in texts if (document := parse(text, label)).data is not None]
    return documents or [parse("", label)]


def scalar(text: str) -> Document:
    """Parse one value as YAML, for `--set step.field=VALUE`."""
    return parse(text, "--set")


def dump(data: Any, **options: Any) -> str:
    """Write plain data as YAML that `parse` reads back unchanged: texts such as "1e-3" are quoted."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options))


def flow(value: Any) -> str:
    """Write a value on one line, as `--set` reads it."""
    return dump([value], default_flow_style=True, width=1_000_000).strip()[1:-1]


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or YAML 1.2 would read as a number."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Write a text, quoted if it would be read as a number."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if NUMBER.fullmatch(data) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _with_texts(data: Any, texts: Mapping[KeyPath, str], path: KeyPath = ()) -> Any:
    """Return a copy of the data with the values at some key paths replaced by texts."""
    if path in texts:
        return texts[path]
    if isinstance(data, dict):
        return {key: _with_texts(value, texts, (*path, key)) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_texts(value, texts, (*path, i)) for i, value in enumerate(data)]
    return data


def _explain(detail: ErrorDetails, value: Any, model: type[BaseModel]) -> tuple[str, str | None]:
    """Return message and hint for a pydantic error, in terms of the document."""
    kind, loc = detail["type"], detail["loc"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        models = _innermost(model, loc)
        for constants in (getattr(inner, "constants", {}) for inner in models):
            if loc[-1] in constants:
                return f"no longer a field, because its value is always {json.dumps(constants[loc[-1]])}", "Remove it."
        known = context.get("known") or sorted(set().union(*map(_names, models)))
        return f"unknown field. {nearest(str(loc[-1]), known)}", None
    if kind == "missing":
        types = [inner.model_fields[str(loc[-1])].annotation for inner in _innermost(model, loc) if loc[-1] in inner.model_fields]
        only = next((get_args(kind)[0] for kind in types if get_origin(kind) is Literal and len(get_args(kind)) == 1), None)
        return "required field is missing", None if only is None else f"Add the line `{loc[-1]}: {only}`."
    if kind == "union_tag_not_found" or kind == "union_tag_invalid":
        return f"expected a mapping with fields, found {_brief(value)}", None
    if kind == "string_pattern_mismatch":
        name = loc[-2] if loc[-1] == "[key]" else value
        return f"expected lower-case letters, digits and . _ - (pattern {context['pattern']}), found {_brief(name)}", None
    expected_kinds = {
        "tuple_type": "a list",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping with fields",
        "string_too_short": "a text that is not empty",
        "too_short": f"at least {context.get('min_length')} entries",
    }
    if kind in expected_kinds:
        shape = {"tuple_type": _as_list, "list_type": _as_list, "dict_type": _as_mapping}.get(kind)
        written = shape(value) if shape and loc else None
        hint = f"Write `{dump({loc[-1]: written}, default_flow_style=True, width=math.inf).strip()[1:-1]}`." if written else None
        return f"expected {expected_kinds[kind]}, found {_brief(value)}", hint
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ").strip()
    if kind == "value_error":
        return message, None
    hint = None
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        hint = f"YAML reads this as {type(value).__name__}: put it in quotes."
    elif isinstance(value, bool) and kind in ("int_type", "float_type"):
        hint = "YAML reads yes, no, on, off, true and false as booleans: write a number."
    return f"expected {message}, found {_brief(value)}", hint


def _as_list(value: Any) -> list[Any] | None:
    """Return a mapping as the list that was meant: one entry, or one for each name, which becomes its id."""
    if not isinstance(value, dict):
        return None
    named = all(isinstance(inner, dict) for inner in value.values())
    return [{"id": name, **inner} for name, inner in value.items()] if named else [value]


def _as_mapping(value: Any) -> dict[str, object] | None:
    """Return a list of texts, or of mappings with one key, as the mapping that was meant: a text is named by its last part."""
    if not isinstance(value, list) or not all(
        isinstance(entry, str) or (isinstance(entry, dict) and len(entry) == 1) for entry in value
    ):
        return None
    entries = [{entry.rstrip("/").rpartition("/")[2].lower(): entry} if isinstance(entry, str) else entry for entry in value]
    return {name: inner for entry in entries for name, inner in entry.items()}


def _innermost(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """Return the innermost models on the path to an unknown field."""
    candidates: list[type[BaseModel]] = [model]
    for part in loc[:-1]:
        tagged = [m for m in candidates if part in (getattr(m, "tag", None), m.__name__.lower())]
        inner = tagged or [m for c in candidates for m in _models_of(c, part)]
        # The tag `entry` marks a value that is a brick's fields, in a mapping that may also hold plain weights.
        if part == "entry":
            inner = [m for m in candidates if "weight" in m.model_fields]
        if inner:
            candidates = inner
    return candidates


def _names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def _models_of(model: type[BaseModel], part: str | int) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = []
    for name, info in model.model_fields.items():
        if part in (name, info.alias):
            stack: list[Hashable | Any] = [info.annotation]
            while stack:
                kind = stack.pop()
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    models.append(kind)
                stack.extend(getattr(kind, "__args__", ()))
    return models


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)

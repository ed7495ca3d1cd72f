"""YAML that users write: read safely, validated strictly, every error at its file:line:col."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from workbench.errors import WorkbenchError, nearest

KeyPath = tuple[str | int, ...]
Mark = tuple[int, int]
Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
_OF_A_KEY = ("missing", "extra_forbidden")
_SHALLOW = ("too_short", "string_type", "dict_type", "model_type")
_PLAIN_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:int")


@dataclass(frozen=True)
class Document:
    """Parsed YAML and where each key stands.

    Attributes:
        data: Plain Python data.
        marks: Key path -> (line, column), counted from 1. A mapping's entry is marked at its key.
        path: The file, as errors show it.
    """

    data: Any
    marks: dict[KeyPath, Mark]
    path: str

    def at(self, path: KeyPath) -> str:
        """`file:line:col` of a key path, or of its nearest parent that stands in the file."""
        while path and path not in self.marks:
            path = path[:-1]
        line, column = self.marks.get(path, (1, 1))
        return f"{self.path}:{line}:{column}"

    def error(self, path: KeyPath, message: str, hint: str | None = None) -> WorkbenchError:
        """An error at a key path; exit code 2, since the document itself is invalid."""
        dotted = ".".join(map(str, path))
        where = f"{self.at(path)} {dotted}: " if dotted else f"{self.at(path)} "
        return WorkbenchError(where + message, hint, exit_code=2)

    def validate(self, model: type[Model], context: Any = None) -> Model:
        """The document as a pydantic model; all problems are listed at once, each at its place."""
        try:
            return model.model_validate(self.data, context=context)
        except ValidationError as error:
            raise self._all(error.errors(include_url=False), model) from None

    def _all(self, details: list[ErrorDetails], model: type[BaseModel]) -> WorkbenchError:
        lines = []
        hints: list[str] = []
        paths = [self._existing(detail["loc"], detail["type"] in _OF_A_KEY) for detail in details]
        for detail, path in zip(details, paths, strict=True):
            # "Too short" after an element was refused, "not a string" where a union also tried a mapping: the deeper one says why.
            if detail["type"] in _SHALLOW and any(other[: len(path)] == path and len(other) > len(path) for other in paths):
                continue
            message, hint = _explain(detail, self._value(path), model)
            lines.append(self.error(path, message).message)
            if hint and hint not in hints:
                hints.append(hint)
        return WorkbenchError("\n".join(dict.fromkeys(lines)), " ".join(hints) or None, exit_code=2)

    def _existing(self, loc: KeyPath, of_a_key: bool) -> KeyPath:
        """Drop what pydantic adds to a location (union tags, `[key]`) and the file does not have.

        With `of_a_key` the last part is kept: a missing field is named, at its parent's place.
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


def load(path: Path, shown: str | None = None) -> Document:
    """Read one YAML file. Errors: missing, over 1 MB, not UTF-8, not YAML, duplicate keys, several documents."""
    shown = shown or _shown(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise WorkbenchError(f"{shown}: no such file", nearest(path.name, near) if near else None, 2) from None
    except IsADirectoryError:
        raise WorkbenchError(f"{shown}: is a directory, expected a YAML file", None, 2) from None
    if len(raw) > MAX_BYTES:
        raise WorkbenchError(f"{shown}: {len(raw):,} bytes; YAML documents are read up to {MAX_BYTES:,}", None, 2)
    try:
        return parse(raw.decode("utf-8"), shown)
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{shown}: not UTF-8 text (byte {error.start})", None, 2) from None


def parse(text: str, shown: str = "<text>") -> Document:
    """Parse YAML text; see `load`."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            marks: dict[KeyPath, Mark] = {}
            if node is None:
                return Document(None, marks, shown)
            _walk(node, (), marks, shown)
            return Document(loader.construct_document(node), marks, shown)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1}:{mark.column + 1}" if mark else shown
        raise WorkbenchError(f"{where} not valid YAML: {error.problem or error.context}", None, 2) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        raise WorkbenchError(f"{shown}: not valid YAML: {error}", None, 2) from None
    except RecursionError:
        raise WorkbenchError(f"{shown}: nested too deeply", None, 2) from None


def scalar(text: str) -> Any:
    """One value as YAML reads it, for `--set step.field=VALUE`."""
    return parse(text, "--set").data


def _walk(node: yaml.Node, path: KeyPath, marks: dict[KeyPath, Mark], shown: str) -> None:
    """Record marks; refuse what a recipe has no use for: aliases' blow-ups, merge keys, duplicates, depth."""
    marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    where = f"{shown}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if len(path) > MAX_DEPTH or len(marks) > 100_000:
        raise WorkbenchError(f"{where} nested too deeply, or too many aliases", None, 2)
    if isinstance(node, yaml.MappingNode):
        for key, key_node, value in _entries(node, shown):
            mark = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if (*path, key) in marks:
                first = marks[(*path, key)]
                raise WorkbenchError(
                    f"{shown}:{mark[0]}:{mark[1]} duplicate key '{key}' (first at line {first[0]})",
                    "Keep one of the two; YAML would silently take the last.",
                    2,
                )
            marks[(*path, key)] = mark
            _walk(value, (*path, key), marks, shown)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*path, i), marks, shown)


def _entries(node: yaml.MappingNode, shown: str) -> Iterator[tuple[str | int, yaml.Node, yaml.Node]]:
    for key_node, value in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            mark = key_node.start_mark
            raise WorkbenchError(f"{shown}:{mark.line + 1}:{mark.column + 1} keys must be plain words", None, 2)
        is_int = key_node.tag == "tag:yaml.org,2002:int"
        if key_node.tag not in _PLAIN_KEYS or (is_int and not key_node.value.isdecimal()):
            mark = key_node.start_mark
            kind = key_node.tag.rpartition(":")[2]
            raise WorkbenchError(
                f"{shown}:{mark.line + 1}:{mark.column + 1} YAML reads the key {key_node.value} as {kind}, expected text",
                f'Put it in quotes: "{key_node.value}".',
                2,
            )
        yield (int(key_node.value) if is_int else str(key_node.value)), key_node, value


def _explain(detail: ErrorDetails, value: Any, model: type[BaseModel]) -> tuple[str, str | None]:
    """Pydantic's error in the words of the document: message and hint."""
    kind, loc = detail["type"], detail["loc"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = context.get("known") or sorted(_known_fields(model, loc))
        return f"unknown field. {nearest(str(loc[-1]), known)}", None
    if kind == "missing":
        return "required field is missing", None
    if kind == "union_tag_not_found" or kind == "union_tag_invalid":
        return f"expected a mapping with fields, found {_brief(value)}", None
    if kind == "string_pattern_mismatch":
        found = loc[-2] if loc[-1] == "[key]" else value
        return f"expected lower-case letters, digits and . _ - (pattern {context['pattern']}), found {_brief(found)}", None
    plain = {"tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping", "model_type": "a mapping with fields",
             "string_too_short": "a text, not an empty one",
             "too_short": f"at least {context.get('min_length')} entries"}  # fmt: skip
    if kind in plain:
        return f"expected {plain[kind]}, found {_brief(value)}", None
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ").strip()
    if kind == "value_error":
        return message, None
    hint = None
    if kind == "string_type" and isinstance(value, (bool, date, int, float)):
        hint = f"YAML reads this as {type(value).__name__}: put it in quotes."
    return f"expected {message}, found {_brief(value)}", hint


def _known_fields(model: type[BaseModel], loc: tuple[str | int, ...]) -> set[str]:
    """Names that could stand beside the unknown last part of `loc`: those of the innermost model on the way."""
    known = _names(model)
    candidates: list[type[BaseModel]] = [model]
    for part in loc[:-1]:
        tagged = [m for m in candidates if part in (getattr(m, "tag", None), m.__name__.lower())]
        inner = tagged or [m for c in candidates for m in _models_of(c, part)]
        # A mapping that mixes kinds of values (a weight, or a brick's fields) is told apart by its tag.
        if part == "entry":
            inner = [m for m in candidates if "weight" in m.model_fields]
        if inner:
            candidates = inner
            known = set().union(*(_names(m) for m in inner))
    return known


def _names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def _models_of(model: type[BaseModel], part: str | int) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    for name, field in model.model_fields.items():
        if part in (name, field.alias):
            stack: list[Hashable | Any] = [field.annotation]
            while stack:
                kind = stack.pop()
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    found.append(kind)
                stack.extend(getattr(kind, "__args__", ()))
    return found


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)

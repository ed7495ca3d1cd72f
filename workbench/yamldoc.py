"""YAML that users write: read safely, validated strictly, every error at its file:line:col."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticKnownError, core_schema

from workbench.errors import WorkbenchError, nearest
from workbench.yamltree import NUMBER, Mark, read_tree
from workbench.yamltree import KeyPath as KeyPath

Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 1_000_000
_OF_A_KEY = ("missing", "extra_forbidden")
_SHALLOW = ("too_short", "string_type", "dict_type", "model_type")
_NUMBERS = ("int", "float")
_LISTED = 50
"""Problems that one error names."""


def _numeric(schema: Any, model: type) -> Any:
    """Return a core schema in which every number refuses truth values, and every float infinities; models inside have their own."""
    if isinstance(schema, (list, tuple)):
        return type(schema)(_numeric(inner, model) for inner in schema)
    if not isinstance(schema, dict) or (schema.get("type") == "model" and schema.get("cls") is not model):
        return schema
    kept = ("metadata", "ref", "default", "config", "cls")
    found = {key: value if key in kept else _numeric(value, model) for key, value in schema.items()}
    if found.get("type") not in _NUMBERS:
        return found
    if found["type"] == "float":
        found.setdefault("allow_inf_nan", False)
    if found.get("strict"):
        return found
    before = _no_switch_for_a_whole_number if found["type"] == "int" else _no_switch_for_a_number
    return core_schema.no_info_before_validator_function(before, found)


def _no_switch_for_a_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _no_switch_for_a_whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


class Written(BaseModel):
    """Base of everything that users write in YAML: a number is never a truth value, and a float never infinite.

    Pydantic by itself takes `yes` for 1 where a number is wanted.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Build the schema that pydantic builds, with stricter numbers."""
        schema: CoreSchema = _numeric(handler(source), cls)
        return schema


@dataclass(frozen=True)
class Document:
    """Parsed YAML and where each key stands.

    Attributes:
        data: Plain Python data.
        marks: Key path -> (line, column), counted from 1. A mapping's entry is marked at its key.
        path: The file, as errors show it.
        texts: Key path -> source text of numbers such as 1e-3, which a field that wants a text takes as written.
    """

    data: Any
    marks: dict[KeyPath, Mark]
    path: str
    texts: dict[KeyPath, str] = field(default_factory=dict)

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

    def replace_texts(self, path: KeyPath, by: Document) -> None:
        """Note that a value was exchanged for another document's, whose numbers keep their source texts."""
        for old in [old for old in self.texts if old[: len(path)] == path]:
            del self.texts[old]
        self.texts.update({(*path, *inner): text for inner, text in by.texts.items()})

    @property
    def as_texts(self) -> Any:
        """Return the data with numbers such as 1e-3 as they are written, for documents whose fields are texts."""
        return _with_texts(self.data, self.texts) if self.texts else self.data

    def validate(self, model: type[Model], context: Any = None) -> Model:
        """The document as a pydantic model; all problems are listed at once, each at its place."""
        data = self.data
        try:
            return model.model_validate(data, context=context)
        except ValidationError as error:
            details = error.errors(include_url=False)
        places = [
            self._existing(detail["loc"], False) for detail in details if detail["type"] in ("string_type", "literal_error")
        ]
        wanted = {path: self.texts[path] for path in places if path in self.texts}
        if wanted:
            try:
                return model.model_validate(_with_texts(data, wanted), context=context)
            except ValidationError as error:
                details = error.errors(include_url=False)
        raise self._all(details, model) from None

    def _all(self, details: list[ErrorDetails], model: type[BaseModel]) -> WorkbenchError:
        lines = []
        hints: list[str] = []
        more, details = len(details) - _LISTED, details[:_LISTED]
        paths = [self._existing(detail["loc"], detail["type"] in _OF_A_KEY) for detail in details]
        for detail, path in zip(details, paths, strict=True):
            # "Too short" after an element was refused, "not a string" where a union also tried a mapping: the deeper one says why.
            if detail["type"] in _SHALLOW and any(other[: len(path)] == path and len(other) > len(path) for other in paths):
                continue
            message, hint = _explain(detail, self._value(path), model)
            lines.append(self.error(path, message).message)
            if hint and hint not in hints:
                hints.append(hint)
        if more > 0:
            lines.append(f"{self.path}: {more} more problems of this kind")
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
    tree = read_tree(text, shown)
    return Document(tree.data, tree.marks, shown, tree.texts)


def scalar(text: str) -> Document:
    """One value as YAML reads it, for `--set step.field=VALUE`."""
    return parse(text, "--set")


def dump(data: Any, **options: Any) -> str:
    """Write plain data as YAML that `parse` reads back equal: texts such as "1e-3" stand in quotes."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that some reader of YAML 1.1 or 1.2 takes for a number."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Write a text, in quotes where it would read as a number."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if NUMBER.fullmatch(data) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _with_texts(data: Any, texts: Mapping[KeyPath, str], path: KeyPath = ()) -> Any:
    """Return a copy of the data with the values at some places replaced."""
    if path in texts:
        return texts[path]
    if isinstance(data, dict):
        return {key: _with_texts(value, texts, (*path, key)) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_texts(value, texts, (*path, i)) for i, value in enumerate(data)]
    return data


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
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        hint = f"YAML reads this as {type(value).__name__}: put it in quotes."
    elif isinstance(value, bool) and kind in ("int_type", "float_type"):
        hint = "YAML reads yes, no, on, off, true and false as truth values: write a number."
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
    for name, info in model.model_fields.items():
        if part in (name, info.alias):
            stack: list[Hashable | Any] = [info.annotation]
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

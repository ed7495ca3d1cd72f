"""Table of the commands with `--json`, and what docs/ publishes of their documents: JSON schemas and the page docs/json.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter

from workbench.cli.documents.advice import AdviceDocument
from workbench.cli.documents.analyze import (
    AblationDocument,
    EverythingDocument,
    FunctionsDocument,
    SparsityDocument,
)
from workbench.cli.documents.barrier import BarrierDocument
from workbench.cli.documents.bricks import BrickDocument, ExtractDocument, ShownBrick
from workbench.cli.documents.decompose import DecompositionDocument
from workbench.cli.documents.document import Document
from workbench.cli.documents.edits import FactsCheckDocument, FactsImportDocument, RebaseDocument, TraceDocument
from workbench.cli.documents.items import ItemsDocument
from workbench.cli.documents.locate import KnowledgeDocument
from workbench.cli.documents.machine import DoctorDocument, ExpertsDocument
from workbench.cli.documents.memories import MemoryChange, MemoryDocument
from workbench.cli.documents.methods import MethodDocument
from workbench.cli.documents.neuron_files import ImportedSetsDocument
from workbench.cli.documents.partition import PartitionDocument
from workbench.cli.documents.recipes import RecipeDiffDocument
from workbench.cli.documents.routing import ExplainDocument, MeasuredBrick, RouteCheckDocument
from workbench.cli.documents.run import PlanDocument, RunDocument, RunRecord, RunRow
from workbench.cli.documents.scores import CompareDocument, EvalDocument, ImportedScores, PulledScores, StoredPlan
from workbench.cli.documents.search import SearchDocument
from workbench.cli.documents.shipping import ExportCheckDocument, ExportDocument, PushDocument
from workbench.cli.documents.suites import SuiteCheckDocument, SuiteDocument, SuiteNewDocument, SuiteRow
from workbench.cli.documents.transplant import CarriedDocument
from workbench.steps.fields import field_docs

DOCUMENTS: Mapping[str, Any] = {
    "plan": PlanDocument | list[PlanDocument],
    "run": RunDocument,
    "eval": EvalDocument | list[EvalDocument],
    "compare": CompareDocument,
    "search": SearchDocument,
    "methods": MethodDocument | list[MethodDocument],
    "recipe diff": RecipeDiffDocument,
    "runs ls": list[RunRow],
    "runs show": RunRecord,
    "brick ls": list[BrickDocument],
    "brick show": ShownBrick,
    "brick extract": ExtractDocument,
    "brick bake": RunDocument,
    "brick advise": AdviceDocument,
    "brick barrier": BarrierDocument,
    "brick transplant": CarriedDocument,
    "suite ls": list[SuiteRow],
    "suite show": SuiteDocument,
    "suite check": SuiteCheckDocument,
    "suite new": SuiteNewDocument,
    "scores ls": list[StoredPlan],
    "scores import": list[ImportedScores],
    "scores pull": PulledScores,
    "scores items": ItemsDocument,
    "facts check": FactsCheckDocument,
    "facts import": FactsImportDocument,
    "edit rebase": RebaseDocument,
    "edit trace": TraceDocument,
    "memory ls": MemoryDocument,
    "memory log": list[MemoryChange],
    "route explain": ExplainDocument,
    "route check": RouteCheckDocument,
    "route measure": list[MeasuredBrick],
    "analyze functions": FunctionsDocument,
    "analyze sparsity": SparsityDocument,
    "analyze ablate": AblationDocument,
    "analyze partition": PartitionDocument,
    "analyze locate": KnowledgeDocument,
    "analyze decompose": DecompositionDocument,
    "analyze import": ImportedSetsDocument,
    "analyze all": EverythingDocument,
    "experts": ExpertsDocument,
    "push": PushDocument,
    "export write": ExportDocument,
    "export check": ExportCheckDocument,
    "doctor": DoctorDocument,
}
"""Command -> type of the document that it prints with `--json`."""

_TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(command: str) -> dict[str, Any]:
    """Return the JSON schema of a command's document, with the texts of its fields."""
    made = TypeAdapter(DOCUMENTS[command]).json_schema(mode="serialization")
    classes = {cls.__name__: cls for cls in _subclasses(Document)}
    for name, part in {**made.get("$defs", {}), made.get("title", ""): made}.items():
        if name in classes:
            _describe(part, classes[name])
    return {"$schema": _DIALECT, **made, "title": f"workbench {command} --json"}


def _describe(part: dict[str, Any], cls: type[BaseModel]) -> None:
    """Add the texts of a class to its part of a schema, and remove defaults, which only mark fields that can be absent."""
    for name, text in field_docs(cls).items():
        shown = part["properties"][cls.model_fields[name].alias or name]
        shown["description"] = text
        shown.pop("default", None)
        shown.pop("title", None)


def _subclasses(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for inner in cls.__subclasses__():
        yield inner
        yield from _subclasses(inner)


def pages() -> dict[str, str]:
    """Return the generated files of docs/: name -> content."""
    schemas = {schema_file(command): _text(schema(command)) for command in DOCUMENTS}
    return {"json.md": index(), **{page_of(command): page(command) for command in DOCUMENTS}, **schemas}


def schema_file(command: str) -> str:
    """Return the name of a command's schema file in docs/."""
    return f"schemas/{command.replace(' ', '-')}.json"


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def page_of(command: str) -> str:
    """Return the name of the page in docs/ that lists the fields of a command's document."""
    return f"json/{command.replace(' ', '-')}.md"


def index() -> str:
    """Return the text of docs/json.md: every document with its page and its schema."""
    lines = [
        "# JSON output",
        "",
        "Generated from the code by `make docs`. With `--json`, a command prints one JSON document on stdout and nothing else there.",
        "Each document has a JSON schema. Fields can be added in later versions; existing fields keep their name and meaning.",
        "",
        "| command | document | schema |",
        "| --- | --- | --- |",
    ]
    for command in DOCUMENTS:
        file = schema_file(command)
        lines.append(f"| [`{command}`]({page_of(command)}) | {_cell(_first(_intro(schema(command))))} | [schema]({file}) |")
    return "\n".join([*lines, ""])


def page(command: str) -> str:
    """Return the page that lists the fields of a command's document."""
    made = schema(command)
    lines = [
        f"# workbench {command} --json",
        "",
        f"{_intro(made)} Schema: [{schema_file(command)}](../{schema_file(command)})",
        "",
        "`[]` stands for each entry of a list, `.*` for each value of an object whose keys are names. A field marked *optional* is",
        "absent from some documents.",
        "",
        "| field | type | meaning |",
        "| --- | --- | --- |",
        *(f"| `{path}` | {kind} | {_cell(text)} |" for path, kind, text in _Rows(made).of(made)),
        "",
    ]
    return "\n".join(lines)


def _first(text: str) -> str:
    """Return the first sentence of a text, behind the words that say that the document is a list."""
    return text.removeprefix("A list. ").partition(". ")[0].removesuffix(".")


def _intro(made: Mapping[str, Any]) -> str:
    """Return the description of the document, and whether it is a list."""
    parts = made.get("anyOf", [made])
    first = parts[0]
    listed = first.get("type") == "array"
    target = first["items"] if listed else first
    text = " ".join(_resolved(target, made).get("description", "").split())
    if listed:
        return f"A list. Each entry: {text[:1].lower()}{text[1:]}"
    return f"{text} Or a list of these." if len(parts) > 1 else text


class _Rows:
    """Rows of a document's table. An object that was listed before is listed once."""

    def __init__(self, made: Mapping[str, Any]) -> None:
        self._made = made
        self._places: dict[str, str] = {}

    def of(self, part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
        """Yield (path, type, text) of all fields in a part of the schema."""
        part = next(iter(p for p in part["anyOf"] if p != {"type": "null"}), part) if "anyOf" in part else part
        if "$ref" in part:
            self._places.setdefault(part["$ref"], prefix)
            part = _resolved(part, self._made)
        if part.get("type") == "array" and isinstance(part.get("items"), dict):
            yield from self.of(part["items"], f"{prefix}[]")
            return
        if isinstance(more := part.get("additionalProperties"), dict):
            yield from self._named(more, prefix)
        required = part.get("required", ())
        for name, field in part.get("properties", {}).items():
            path = f"{prefix}.{name}" if prefix else name
            yield from self._field(path, field, name in required)

    def _named(self, more: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
        path = f"{prefix}.*" if prefix else "*"
        if self._before(more) is None:
            yield from self.of(more, path)

    def _field(self, path: str, field: Mapping[str, Any], required: bool) -> Iterator[tuple[str, str, str]]:
        kind = self._kind(field) + ("" if required else ", *optional*")
        before = self._before(field)
        text = field.get("description", "")
        yield path, kind, f"{text} Fields: see `{before}`." if before else text
        if before is None:
            yield from self.of(field, path)

    def _before(self, part: Mapping[str, Any]) -> str | None:
        """Return the path at which the object in a part was listed before, or None."""
        for inner in (part, part.get("items"), part.get("additionalProperties"), *part.get("anyOf", ())):
            if isinstance(inner, dict) and inner.get("$ref") in self._places:
                return self._places[inner["$ref"]]
        return None

    def _kind(self, part: Mapping[str, Any]) -> str:
        """Return the type of a value in words."""
        if "anyOf" in part:
            return " or ".join(dict.fromkeys(self._kind(inner) for inner in part["anyOf"]))
        if "enum" in part:
            return " or ".join(f"`{value}`" for value in part["enum"])
        if "const" in part:
            return f"`{part['const']}`"
        part = _resolved(part, self._made)
        if part.get("type") == "array":
            return f"list of {_plural(self._kind(part['items']))}" if isinstance(part.get("items"), dict) else "list"
        if part.get("type") == "object":
            more = part.get("additionalProperties")
            return "object" if "properties" in part or not isinstance(more, dict) else f"object of {_plural(self._kind(more))}"
        return _TYPES.get(str(part.get("type")), "any value")


def _plural(kind: str) -> str:
    """Return a type in the plural: "texts", "objects or nulls"."""
    return " or ".join(word if word.endswith("s") or " " in word else f"{word}s" for word in kind.split(" or "))


def _resolved(part: Mapping[str, Any], made: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part of a schema, or the definition that it refers to."""
    if "$ref" not in part:
        return part
    definition: Mapping[str, Any] = made["$defs"][part["$ref"].rpartition("/")[2]]
    return definition


def _cell(text: str) -> str:
    """Convert text to a cell of a Markdown table: one line, with bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")

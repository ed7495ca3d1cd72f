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
from workbench.cli.documents.items import ItemsDocument
from workbench.cli.documents.locate import KnowledgeDocument
from workbench.cli.documents.machine import DoctorDocument, ExpertsDocument
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
from workbench.cli.memory import MemoryFacts
from workbench.facts.conflicts import ImportedFacts
from workbench.facts.log import MemoryChange
from workbench.library.facts import FactsReport
from workbench.library.rebase import Rebased
from workbench.library.trace import TraceTable
from workbench.results import Part
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
    "facts check": FactsReport,
    "facts import": ImportedFacts,
    "edit rebase": Rebased,
    "edit trace": TraceTable,
    "memory ls": MemoryFacts,
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

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(command: str) -> dict[str, Any]:
    """Return the JSON schema of a command's document, with the texts of its fields."""
    made = TypeAdapter(DOCUMENTS[command]).json_schema(mode="serialization")
    classes = {cls.__name__: cls for cls in _subclasses(Part)}
    for name, part in {**made.get("$defs", {}), made.get("title", ""): made}.items():
        if name in classes:
            _describe(part, classes[name])
    return {"$schema": _DIALECT, **made, "title": f"workbench {command} --json"}


def _describe(part: dict[str, Any], cls: type[BaseModel]) -> None:
    """Add the texts of a class to its part of a schema, and remove defaults, which only mark fields that can be absent."""
    for name, text in field_docs(cls).items():
        shown = part["properties"][cls.model_fields[name].serialization_alias or name]
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
    return {"json.md": index(), **schemas}


def schema_file(command: str) -> str:
    """Return the name of a command's schema file in docs/."""
    return f"schemas/{command.replace(' ', '-')}.json"


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def index() -> str:
    """Return the text of docs/json.md: every document with its schema."""
    lines = [
        "# JSON output",
        "",
        "Generated from the code by `make docs`. With `--json`, a command prints one JSON document on stdout and nothing else there.",
        "Each document has a JSON schema, which says the type and the meaning of every field. Fields can be added in later versions;",
        "existing fields keep their name and meaning.",
        "",
        "| command | document |",
        "| --- | --- |",
    ]
    for command in DOCUMENTS:
        lines.append(f"| [`{command}`]({schema_file(command)}) | {_cell(_first(_intro(schema(command))))} |")
    return "\n".join([*lines, ""])


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


def _resolved(part: Mapping[str, Any], made: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part of a schema, or the definition that it refers to."""
    if "$ref" not in part:
        return part
    definition: Mapping[str, Any] = made["$defs"][part["$ref"].rpartition("/")[2]]
    return definition


def _cell(text: str) -> str:
    """Convert text to a cell of a Markdown table: one line, with bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")

"""Table of the commands with `--json`, and what docs/ publishes of their documents: JSON schemas and the page docs/json.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter

from workbench.bricks.card import ShownCard
from workbench.compare.answers import Items
from workbench.compare.comparison import ComparedRows
from workbench.compare.recommend import ShippedConfiguration
from workbench.facts.conflicts import ImportedFacts
from workbench.facts.log import MemoryChange, MemoryFacts
from workbench.ground.parts import imported, parts
from workbench.ground.recognize import Thing
from workbench.ground.tables import markdown_rows
from workbench.grow.mixtures.mixture import ExpertsUsed
from workbench.recipe.describe import MethodDescription
from workbench.route.deciding.checking import RouteCheck
from workbench.route.mixing.explain import Explanation
from workbench.run.plan import RunPlan
from workbench.run.record import RunRecord, RunResult, RunRow
from workbench.run.rerouting import ListedRouter
from workbench.run.route_statistics import MeasuredBrick
from workbench.run.routers import RouterChange
from workbench.scores.groups import SuiteScores
from workbench.scores.store import StoredPlan
from workbench.steps.fields import field_docs

_CORE: Mapping[str, Any] = {
    "plan": RunPlan | list[RunPlan],
    "run": RunResult,
    "eval": SuiteScores | list[SuiteScores],
    "compare": ComparedRows,
    "ship": ShippedConfiguration,
    "search": None,
    "methods": MethodDescription | list[MethodDescription],
    "recipe diff": None,
    "runs ls": list[RunRow],
    "runs show": RunRecord,
    "brick ls": list[ShownCard],
    "brick show": None,
    "brick train": None,
    "brick extract": None,
    "brick bake": None,
    "brick advise": None,
    "brick barrier": None,
    "brick transplant": None,
    "suite ls": None,
    "suite show": None,
    "suite check": None,
    "suite new": None,
    "scores ls": list[StoredPlan],
    "scores import": None,
    "scores pull": None,
    "scores items": Items,
    "facts check": None,
    "facts import": ImportedFacts,
    "edit rebase": None,
    "edit trace": None,
    "memory ls": MemoryFacts,
    "memory log": list[MemoryChange],
    "route explain": Explanation,
    "route check": RouteCheck,
    "route measure": list[MeasuredBrick],
    "route ls": ListedRouter,
    "route add": RouterChange,
    "route rm": RouterChange,
    "analyze": None,
    "experts": ExpertsUsed,
    "push": None,
    "export write": None,
    "export check": None,
    "open": Thing,
    "doctor": None,
}
"""Command -> type of the document that it prints with `--json`, in the order of docs/json.md; None for a command of a part."""


def _documents() -> dict[str, Any]:
    """Return command -> type of its document, of the core and of all parts."""
    given = {name: place for part in parts().values() for name, place in part.documents.items()}
    types = {name: imported(place) if isinstance(place, str) else list[imported(place[0])] for name, place in given.items()}  # type: ignore[misc]
    return {name: found for name in {**_CORE, **types} if (found := types.get(name, _CORE.get(name))) is not None}


DOCUMENTS: Mapping[str, Any] = _documents()
"""Command -> type of the document that it prints with `--json`."""

_WARNINGS = "Warnings of the command; empty without one."
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(command: str) -> dict[str, Any]:
    """Return the JSON schema of a command's document, with the texts of its fields."""
    made = TypeAdapter(DOCUMENTS[command]).json_schema(mode="serialization")
    classes = _classes(DOCUMENTS[command], {})
    for name, part in {**made.get("$defs", {}), made.get("title", ""): made}.items():
        if name in classes:
            _describe(part, classes[name])
    first = made.get("anyOf", [made])[0]
    if first.get("type") != "array":
        target = _resolved(first, made)
        target["properties"].setdefault("warnings", {"type": "array", "items": {"type": "string"}, "description": _WARNINGS})
        if "anyOf" not in made:
            target["required"] = list(dict.fromkeys([*target.get("required", ()), "warnings"]))
    return {"$schema": _DIALECT, **made, "title": f"workbench {command} --json"}


def _describe(part: dict[str, Any], cls: type[BaseModel]) -> None:
    """Add the texts of a class to its part of a schema, and remove defaults, which only mark fields that can be absent."""
    for name, text in field_docs(cls).items():
        field = cls.model_fields[name]
        shown = part["properties"][field.serialization_alias or field.alias or name]
        shown["description"] = text
        shown.pop("default", None)
        shown.pop("title", None)


def _classes(annotation: Any, found: dict[str, type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """Add the classes of a document's parts, under the names that a schema has for them: other documents may have parts of the same name."""
    for part in get_args(annotation):
        _classes(part, found)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in found.values():
        long_name = f"{annotation.__module__}__{annotation.__qualname__}".replace(".", "__")
        found |= {annotation.__name__: annotation, long_name: annotation}
        annotation.model_rebuild()  # builds are deferred: before, the fields' types may be names of classes further down
        for field in annotation.model_fields.values():
            _classes(field.annotation, found)
    return found


def pages() -> dict[str, str]:
    """Return the generated files of docs/: name -> content."""
    schemas = {schema_file(command): _text(schema(command)) for command in DOCUMENTS}
    return {"json.md": index(), **schemas}


def schema_file(command: str) -> str:
    """Return the name of a command's schema file in docs/."""
    return f"schemas/{command.replace(' ', '-')}.json"


def _text(document: Mapping[str, object]) -> str:
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
    ]
    rows = ([f"[`{command}`]({schema_file(command)})", _first(_intro(schema(command)))] for command in DOCUMENTS)
    return "\n".join([*lines, *markdown_rows(["command", "document"], rows), ""])


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


def _resolved(part: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
    """Return a part of a schema, or the definition that it refers to."""
    if "$ref" not in part:
        return part
    return made["$defs"][part["$ref"].rpartition("/")[2]]

"""Descriptions of methods and their fields, for `workbench methods` and the generated pages in docs/."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator

from workbench.ground.results import JsonObject, absent
from workbench.ground.trust import Plugin
from workbench.recipe.schema import RecipeFields
from workbench.steps import VERBS, Laws, MergeMethod, Step
from workbench.steps.fields import field_docs


def summary(method: type[Step]) -> str:
    """Return the first sentence of a method's docstring, without its reference."""
    text = " ".join((inspect.getdoc(method) or "").split())
    first = text.split(". ")[0].rstrip(".")
    return first.split(" (")[0]


class FieldDescription(JsonObject):
    """A field of a method."""

    name: str
    """Name of the field in a recipe."""
    default: str
    """Default as text; "required" if the field has none, "-" if it is unset or has no short form."""
    text: str
    """Description of the field."""


class NoLaws(JsonObject):
    """An empty object: methods other than merges state no properties."""


class MethodDescription(JsonObject):
    """A method that steps can use."""

    verb: str
    """Verb of its steps: merge, edit or grow."""
    name: str
    """Name of the method."""
    text: str
    """Description of the method."""
    formula: str
    """Formula of the method."""
    paper: str
    """Paper that describes it."""
    laws: Laws | NoLaws
    """Properties that the method guarantees."""
    fields: list[FieldDescription]
    """Fields of its steps."""
    plugin: Plugin | None = absent()
    """Origin of the method, if it is not built in."""


def describe(method: type[Step]) -> MethodDescription:
    """Return the description of a method: text, formula, paper, laws and fields."""
    return MethodDescription(
        verb=method.verb,
        name=method.name,
        text=" ".join((inspect.getdoc(method) or "").split()),
        formula=method.formula,
        paper=method.paper,
        laws=method.laws if issubclass(method, MergeMethod) else NoLaws(),
        fields=list(fields_of(method)),
        plugin=method.plugin,
    )


def fields_of(model: type[Step] | type[RecipeFields]) -> Iterator[FieldDescription]:
    """Yield the fields of a step or a recipe, without its verb."""
    docs = field_docs(model)
    for name, field in model.model_fields.items():
        if name in VERBS:
            continue
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        short = json.dumps(value) if isinstance(value, (str, bool, int, float)) else "-"
        yield FieldDescription(name=field.alias or name, default="required" if field.is_required() else short, text=docs[name])

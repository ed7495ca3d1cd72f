"""What methods and recipes say of themselves: for `workbench methods` and the generated pages in docs/."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from typing import Any

from pydantic.fields import FieldInfo

from workbench.recipe.methods import methods
from workbench.recipe.schema import RecipeFields, recipe_model, recipe_schema
from workbench.steps import Laws, MergeMethod, Step
from workbench.steps.fields import field_docs

_NEEDS = {
    "texts": "calibration texts, run through each brick's model one decoder layer at a time",
    "model": "texts, run through each brick's whole model in float32",
}


_VALUES = [
    "## How values are read",
    "",
    "Recipes, suites, facts, `brick.yaml`, `train.yaml` and `--set` read values in one way.",
    "",
    "| written | read as |",
    "| --- | --- |",
    "| `1e-3`, `1.5e3`, `.5`, `1_000`, `0x1F` | numbers; `1e-3` and the like stay texts where a field wants a text |",
    "| `010`, `1:30` | refused: YAML 1.1 reads them in base 8 and base 60. Write the decimal number, or the text in quotes |",
    "| `yes`, `no`, `on`, `off`, `true`, `false` | truth values; refused where a number or a text is wanted |",
    "| `2026-01-01` | a text |",
    "| `.inf`, `.nan`, `1e400` | refused |",
    "",
    "A file has at most 1 MB, 100,000 values and 40 levels. A key stands once.",
    "",
]


def summary(method: type[Step]) -> str:
    """The method's first sentence, without its reference."""
    text = " ".join((inspect.getdoc(method) or "").split())
    first = text.split(". ")[0].rstrip(".")
    return first.split(" (")[0]


def describe(method: type[Step]) -> dict[str, Any]:
    """A method as plain data: text, formula, paper, laws, fields."""
    laws = {f.name: getattr(method.laws, f.name) for f in dataclass_fields(Laws)} if issubclass(method, MergeMethod) else {}
    return {"verb": method.verb, "name": method.name, "text": " ".join((inspect.getdoc(method) or "").split()), "formula": method.formula,
            "paper": method.paper, "laws": laws, "fields": list(_fields(method)),
            **({"plugin": asdict(method.plugin)} if method.plugin else {})}  # fmt: skip


def _fields(model: type[Step] | type[RecipeFields]) -> Iterable[dict[str, str]]:
    docs = field_docs(model)
    for name, field in model.model_fields.items():
        if name in ("merge", "edit", "grow"):
            continue
        yield {"name": field.alias or name, "default": _default(field), "text": docs[name]}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "-"
    return json.dumps(value) if isinstance(value, (str, bool, int, float)) else "-"


def methods_page() -> str:
    """docs/methods.md."""
    lines = ["# Methods", "", "Generated from the code by `make docs`; `workbench methods NAME` prints the same.", ""]
    for method in methods().values():
        found = describe(method)
        lines += [f"## {found['verb']}: {found['name']}", "", found["text"], ""]
        lines += [f"- {key}: {found[key]}" for key in ("formula", "paper") if found[key]]
        if found["laws"]:
            holds = [name.replace("_", " ") for name, value in found["laws"].items() if value is True]
            lines += [f"- holds (checked by a test): {', '.join(holds)}", f"- passes over every delta: {found['laws']['passes']}"]
            if found["laws"]["needs"] != "tensor":
                lines.append(f"- needs beside the weights: {_NEEDS[found['laws']['needs']]}")
        lines += ["", *_table(found["fields"]), ""]
    return "\n".join(lines)


def recipe_page() -> str:
    """docs/recipe.md's field reference."""
    lines = [
        "# Recipe reference",
        "",
        "Generated from the schema by `make docs`. The JSON schema for editors is [recipe.schema.json](recipe.schema.json).",
        "",
        *_VALUES,
        "## Top level",
        "",
        *_table(_fields(recipe_model())),
        "",
    ]
    for title, name in (
        ("output", "Output"),
        ("tokenizer", "TokenizerFields"),
        ("tokenizer.tokens.TOKEN", "TokenRule"),
        ("tokenizer.tokens.TOKEN.source, as a mapping", "TokenRow"),
        ("eval entries that are not a suite's name", "InlineEval"),
        ("eval entries with facts", "FactsEval"),
        ("eval entries with facts: sequential", "SequentialEval"),
        ("search", "SearchFields"),
        ("search.fidelity", "Fidelity"),
        ("search.space.DIMENSION, a range", "ListedRange"),
        ("search.space.DIMENSION, choices", "ListedChoices"),
        ("bricks.NAME", "BrickRef"),
        ("where", "Where"),
    ):
        found = recipe_schema()["$defs"][name]
        needed = found.get("required", ())
        rows = [{"name": key, "text": value.get("description", ""),
                 "default": "required" if key in needed else json.dumps(value["default"]) if value.get("default") is not None else "-"}
                for key, value in found["properties"].items()]  # fmt: skip
        lines += [f"## {title}", "", found.get("description", ""), "", *_table(rows), ""]
    lines += ["## Values over depth", "", "Every number that a method takes per tensor (weight, lambda, density) may be a schedule:", "",
              "| form | meaning |", "| --- | --- |", "| `0.5` | the same everywhere |",
              "| `{first: 0, last: 1}` | linear from the first layer to the last |",
              "| `{knots: [0, 1, 0.5]}` | linear between evenly spaced depths |",
              '| `[{where: {include: ["*.mlp.*"]}, value: 0.3}]` | the last rule that matches; the default where none does |', "",
              "Embeddings take the first knot, the final norm and the head the last.", "",
              "## Steps", "", "Each step is one of:", ""]  # fmt: skip
    lines += [
        f"- `{m.verb}: {m.name}`: {summary(m)} ([fields](methods.md#{m.verb}-{m.name.replace('/', '')}))"
        for m in methods().values()
    ]
    return "\n".join([*lines, ""])


def schema_text() -> str:
    """docs/recipe.schema.json."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def pages() -> dict[str, str]:
    """File in docs/ -> content: everything that is generated from the code."""
    return {"methods.md": methods_page(), "recipe.md": recipe_page(), "recipe.schema.json": schema_text()}


def _cell(text: str) -> str:
    """Text for a Markdown table: one line, bars and globs' stars escaped."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def _table(rows: Iterable[dict[str, str]]) -> list[str]:
    cells = [f"| `{row['name']}` | {_cell(row['default'])} | {_cell(row['text'])} |" for row in rows]
    return ["| field | default | meaning |", "| --- | --- | --- |", *cells]

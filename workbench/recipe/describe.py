"""Descriptions of methods and recipe fields, for `workbench methods` and the generated pages in docs/."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from workbench.recipe.methods import methods
from workbench.recipe.schema import RecipeFields, recipe_model, recipe_schema
from workbench.results import Part, absent
from workbench.steps import Laws, MergeMethod, Step, verbs
from workbench.steps.fields import field_docs
from workbench.trust import Plugin

_NEEDS = {
    "texts": "calibration texts, run through each brick's model one decoder layer at a time",
    "model": "texts, run through each brick's whole model in float32",
}


_VALUES = [
    "## How values are read",
    "",
    "Recipes, suites, facts, `brick.yaml`, `train.yaml` and `--set` read values in the same way.",
    "",
    "| value in the file | meaning |",
    "| --- | --- |",
    "| `1e-3`, `1.5e3`, `.5`, `1_000`, `0x1F` | A number. In a field that takes text, `1e-3` and similar values are text. |",
    "| `010`, `1:30` | An error, because YAML 1.1 reads them in base 8 and base 60. Write the decimal number, or the text in quotes. |",
    "| `yes`, `no`, `on`, `off`, `true`, `false` | A Boolean. An error in a field that takes a number or text. |",
    "| `2026-01-01` | Text. |",
    "| `.inf`, `.nan`, `1e400` | An error. |",
    "",
    "A file can have at most 1 MB, 100,000 values and 40 levels. Duplicate keys are errors.",
    "",
]


_SCHEDULES = [
    "## Values over depth",
    "",
    "Every number that a method takes per tensor (weight, lambda, density) can be a schedule:",
    "",
    "| form | meaning |",
    "| --- | --- |",
    "| `0.5` | The same value for all tensors. |",
    "| `{first: 0, last: 1}` | Linear from the first layer to the last layer. |",
    "| `{knots: [0, 1, 0.5]}` | Linear between evenly spaced depths. |",
    '| `[{where: {include: ["*.mlp.*"]}, value: 0.3}]` | The value of the last rule that matches, or the field\'s default if none matches. |',
    "",
    "Embeddings take the first knot. The final norm and the head take the last knot.",
    "",
]

_SHARED = {
    "Step": "Every step",
    "MergeMethod": "Merges",
    "OverlapWeighted": "Merges that weigh bricks by their overlap",
    "ReadsTexts": "Merges that run models on texts",
    "Calibrated": "Merges that run each brick's model on texts of its task",
    "EditMethod": "Edits",
    "MemoryMethod": "Memories",
    "GrowMethod": "Growth",
    "TextMethod": "Growth that runs texts through the model",
    "TrainMethod": "Steps that train a brick",
    "TrainSpec": "Training",
    "RowTraining": "Training on rows",
    "FuseMethod": "Fusing",
    "Fused": "Training on fused distributions",
    "CalibratedRoute": "Routers that learn from prompts",
    "PooledRoute": "Routers that read hidden states",
}
"""Base class of methods -> title of the section in docs/methods/shared.md that lists the fields that these methods have from it."""
_SHARED_PAGE = "methods/shared.md"

_SWEEPS = [
    "## sweep",
    "",
    "Each entry is a field and its values; every combination is a configuration ([Sweeps](evaluation-sweeps.md#sweeps)). Two numbers are two",
    "values, not a range as in `search`.",
    "",
    "| entry | varies |",
    "| --- | --- |",
    "| `mix.lambda: [0.25, 0.5, 1]` | A field of the step with this id; `0.lambda` names the step by its index. |",
    "| `mix.merge: [ties, dare]` | The method. Fields that a method does not have are left out. |",
    "| `mix.bricks: [[a, b], [a, b, c]]` | The bricks, all with weight 1. |",
    "| `mix.bricks.a: [0.5, 1]` | The weight of a brick. |",
    "| `mix.lambda.knots.0: [0, 1]` | One knot of a schedule. |",
    "| `seed: [0, 1, 2]` | The seed. Scores are averaged over it. |",
    "",
]


def summary(method: type[Step]) -> str:
    """Return the first sentence of a method's docstring, without its reference."""
    text = " ".join((inspect.getdoc(method) or "").split())
    first = text.split(". ")[0].rstrip(".")
    return first.split(" (")[0]


class FieldDescription(Part):
    """A field of a method."""

    name: str
    """Name of the field in a recipe."""
    default: str
    """Default as text; "required" if the field has none, "-" if it is unset or has no short form."""
    text: str
    """Description of the field."""


class NoLaws(Part):
    """An empty object: methods other than merges state no properties."""


class MethodDescription(Part):
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
        fields=list(_fields(method)),
        plugin=method.plugin,
    )


def _fields(model: type[Step] | type[RecipeFields]) -> Iterator[FieldDescription]:
    docs = field_docs(model)
    for name, field in model.model_fields.items():
        if name not in verbs():
            yield FieldDescription(name=field.alias or name, default=_default(field), text=docs[name])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "-"
    return json.dumps(value) if isinstance(value, (str, bool, int, float)) else "-"


def _shown_default(schema: dict[str, Any]) -> str:
    default = schema.get("default")
    return "-" if default is None else json.dumps(default)


_KINDS = {
    "merge": "Combine the deltas of bricks into one delta. [Choosing a method](merging.md#choosing-a-method).",
    "edit": "Teach the model facts, scale its neurons, or steer it. [Editing](editing.md).",
    "grow": "Add layers, width, tokens or experts to the model. [Growing](growing.md).",
    "fuse": "Train on the next-token distributions of other models. [Fusing](fusing.md).",
    "route": "Keep bricks apart and choose for each prompt. [Routing](routing.md).",
}
_MEMORY = {
    "stream": "a few blocks of rows at a time",
    "tensor": "a few copies of one tensor at a time",
    "model": "a live model",
}


def methods_page() -> str:
    """Return the text of docs/methods.md: every method with its summary, a table for each kind of step."""
    lines = [
        "# Methods",
        "",
        "Generated from the code by `make docs`. `workbench methods NAME` prints the description of one method with all its fields.",
        f"Fields that several methods share, such as those of training, stand on [one page]({_SHARED_PAGE}).",
        "",
    ]
    for verb, text in _KINDS.items():
        rows = [m for m in methods().values() if m.verb == verb]
        lines += [f"## {verb}", "", text, "", "| step | what it does |", "| --- | --- |"]
        lines += [f"| [`{m.verb}: {m.name}`]({page_of(m)}) | {_cell(summary(m))} |" for m in rows]
        lines.append("")
    return "\n".join(lines)


def method_page(method: type[Step], evidence: str = "") -> str:
    """Return the page of a method. All pages have the same sections in the same order; a section without content is left out.

    Args:
        method: The method.
        evidence: What was measured of it in this repository, as Markdown.
    """
    described = describe(method)
    laws = described.laws
    paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(method) or "").split("\n\n")]
    lines = [f"# {described.verb}: {described.name}", ""]
    for paragraph in paragraphs:
        lines += [paragraph, ""]
    if described.formula:
        lines += ["## Formula", "", f"```text\n{described.formula}\n```", ""]
    lines += ["## Fields", "", *_own_fields(method, described.fields), ""]
    if isinstance(laws, Laws):
        holds = [f"- {name.replace('_', ' ')}" for name, value in laws if value is True]
        lines += ["## Properties", "", "A test checks these on random tensors.", "", *holds, ""] if holds else []
        lines += ["## Cost", "", f"- memory: {_MEMORY[laws.memory]}", f"- passes over every delta: {laws.passes}"]
        lines += [f"- needs besides the weights: {_NEEDS[laws.needs]}"] if laws.needs != "tensor" else []
        lines.append("")
    lines += ["## Evidence here", "", evidence, ""] if evidence else []
    lines += ["## Source", "", f"{described.paper}.".replace("..", "."), ""] if described.paper else []
    return "\n".join(lines)


def _origins(method: type[Step]) -> dict[str, str]:
    """Return the class that each field of a method is from, where it is one that several methods share."""
    origins: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        for name in inspect.get_annotations(cls).keys() & set(method.model_fields):
            field = method.model_fields[name].alias or name
            origins.pop(field, None)
            if cls.__name__ in _SHARED:
                origins[field] = cls.__name__
    return origins


def _own_fields(method: type[Step], fields: Sequence[FieldDescription]) -> list[str]:
    """Return the table of the fields that a method does not share, and where the others stand."""
    origins = _origins(method)
    own = [field for field in fields if field.name not in origins]
    shared: dict[str, list[str]] = {}
    for field in fields:
        if origin := origins.get(field.name):
            shared.setdefault(origin, []).append(f"`{field.name}`")
    more = [f"[{_SHARED[name]}](shared.md#{_anchor(_SHARED[name])}): {', '.join(names)}." for name, names in shared.items()]
    return [
        *(_table(own) if own else ["None of its own."]),
        "",
        "Fields that other methods have too:",
        "",
        *(f"- {line}" for line in more),
    ]


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-").replace("'", "")


def shared_page() -> str:
    """Return the text of docs/methods/shared.md: the fields that methods have from a base class, stated once."""
    lines = [
        "# Fields that several methods share",
        "",
        "Generated from the code by `make docs`. The page of a method lists its own fields.",
        "",
    ]
    described: dict[tuple[str, str], FieldDescription] = {}
    for method in methods().values():
        origins = _origins(method)
        for field in _fields(method):
            if origin := origins.get(field.name):
                described.setdefault((origin, field.name), field)
    for name, title in _SHARED.items():
        if rows := [field for (origin, _), field in described.items() if origin == name]:
            lines += [f"## {title}", "", *_table(rows), ""]
    return "\n".join(lines)


def family_page(family: Sequence[type[Step]], evidence: Mapping[str, str]) -> str:
    """Return the page of methods that share their fields: one table of these, and a row a method with what is its own.

    Args:
        family: The methods, which have one base class and one `page`.
        evidence: Tag of a method -> what was measured of it, as Markdown.
    """
    base = next(cls for cls in family[0].__mro__[1:] if issubclass(cls, Step))
    shared, text = list(_fields(base)), inspect.getdoc(base) or ""
    own = {method: [field for field in _fields(method) if field not in shared] for method in family}
    lines = [f"# {family[0].verb}: {', '.join(method.name for method in family)}", "", *text.split("\n"), ""]
    lines += ["| step | formula | what it does | source |", "| --- | --- | --- | --- |"]
    for method in family:
        text = " ".join((inspect.getdoc(method) or "").split())
        lines.append(f"| `{method.verb}: {method.name}` | `{_cell(method.formula)}` | {_cell(text)} | {_cell(method.paper)} |")
    lines += ["", "## Fields of one method", "", "| step | field | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{method.name}` {row}" for method in family for row in _table(own[method])[2:]]
    lines += ["", "## Fields", "", *_table(shared), ""]
    measured = [evidence[tag] for method in family if (tag := f"{method.verb}:{method.name}") in evidence]
    return "\n".join([*lines, *(["## Evidence here", "", *measured, ""] if measured else [])])


def page_of(method: type[Step]) -> str:
    """Return the name of a method's page in docs/; methods with the same fields, such as mergekit's, have one together."""
    return f"methods/{method.verb}-{method.page or method.name}.md"


def recipe_page() -> str:
    """Return the text of docs/recipe.md, the reference of all recipe fields."""
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
    definitions = recipe_schema()["$defs"]
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
        ("where", "MergeWhere"),
    ):
        definition = definitions[name]
        required = definition.get("required", ())
        rows = [
            FieldDescription(
                name=key, default="required" if key in required else _shown_default(part), text=part.get("description", "")
            )
            for key, part in definition["properties"].items()
        ]
        lines += [f"## {title}", "", definition.get("description", ""), "", *_table(rows), ""]
    kinds = ", ".join(f"[{verb}](methods.md#{verb})" for verb in _KINDS)
    lines += [*_SWEEPS, *_SCHEDULES, "## Steps", "", f"A step has one verb and its method: {kinds}."]
    return "\n".join([*lines, ""])


def schema_text() -> str:
    """Return the text of docs/recipe.schema.json."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def pages(evidence: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the generated files of docs/: name -> content.

    Args:
        evidence: Tag of a method ("merge:ties") -> what was measured of it, as Markdown.
    """
    families: dict[str, list[type[Step]]] = {}
    for method in methods().values():
        families.setdefault(page_of(method), []).append(method)
    each = {
        page: family_page(family, evidence) if family[0].page else method_page(family[0], evidence.get(family[0].tag, ""))
        for page, family in families.items()
    }
    return {
        "methods.md": methods_page(),
        _SHARED_PAGE: shared_page(),
        **each,
        "recipe.md": recipe_page(),
        "recipe.schema.json": schema_text(),
    }


def _cell(text: str) -> str:
    """Convert text to a cell of a Markdown table: one line, with bars and stars escaped."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def _table(rows: Iterable[FieldDescription]) -> list[str]:
    cells = [f"| `{row.name}` | {_cell(row.default)} | {_cell(row.text)} |" for row in rows]
    return ["| field | default | meaning |", "| --- | --- | --- |", *cells]

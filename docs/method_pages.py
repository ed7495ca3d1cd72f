"""Write docs/methods.md, docs/methods/, docs/recipe.md and the recipe's schema from the methods and the recipe's fields."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workbench.ground.tables import markdown_rows
from workbench.recipe.describe import FieldDescription, describe, fields_of, summary
from workbench.recipe.methods import methods
from workbench.recipe.schema import recipe_model, recipe_schema
from workbench.steps import Laws, Step

_NEEDS = {
    "texts": "calibration texts, run through each brick's model one decoder layer at a time",
    "model": "texts, run through each brick's whole model in float32",
}


_VALUES = [
    "## How values are read",
    "",
    "Recipes, suites, facts, `brick.yaml`, `train.yaml` and `--set` read values in the same way.",
    "",
    *markdown_rows(
        ["value in the file", "meaning"],
        [
            (
                "`1e-3`, `1.5e3`, `.5`, `1_000`, `0x1F`",
                "A number. In a field that takes text, `1e-3` and similar values are text.",
            ),
            (
                "`010`, `1:30`",
                "An error, because YAML 1.1 reads them in base 8 and base 60. Write the decimal number, or the text in quotes.",
            ),
            ("`yes`, `no`, `on`, `off`, `true`, `false`", "A Boolean. An error in a field that takes a number or text."),
            ("`2026-01-01`", "Text."),
            ("`.inf`, `.nan`, `1e400`", "An error."),
        ],
    ),
    "",
    "A file can have at most 1 MB, 100,000 values and 40 levels. Duplicate keys are errors.",
    "",
]
_SCHEDULES = [
    "## Values over depth",
    "",
    "Every number that a method takes per tensor (weight, lambda, density) can be a schedule:",
    "",
    *markdown_rows(
        ["form", "meaning"],
        [
            ("`0.5`", "The same value for all tensors."),
            ("`{first: 0, last: 1}`", "Linear from the first layer to the last layer."),
            ("`{knots: [0, 1, 0.5]}`", "Linear between evenly spaced depths."),
            (
                '`[{where: {include: ["*.mlp.*"]}, value: 0.3}]`',
                "The value of the last rule that matches, or the field's default if none matches.",
            ),
        ],
    ),
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
    *markdown_rows(
        ["entry", "varies"],
        [
            ("`mix.lambda: [0.25, 0.5, 1]`", "A field of the step with this id; `0.lambda` names the step by its index."),
            ("`mix.merge: [ties, dare]`", "The method. Fields that a method does not have are left out."),
            ("`mix.bricks: [[a, b], [a, b, c]]`", "The bricks, all with weight 1."),
            ("`mix.bricks.a: [0.5, 1]`", "The weight of a brick."),
            ("`mix.lambda.knots.0: [0, 1]`", "One knot of a schedule."),
            ("`seed: [0, 1, 2]`", "The seed. Scores are averaged over it."),
        ],
    ),
    "",
]


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
        own = [m for m in methods().values() if m.verb == verb]
        rows = [[f"[`{verb}: {m.name}`]({page_of(m)})", _starred(summary(m))] for m in own if "/" not in m.name]
        if foreign := [m for m in own if "/" in m.name]:
            names = ", ".join(f"`{m.name}`" for m in foreign)
            rows.append([f"[by mergekit's own code]({page_of(foreign[0])})", names])
        lines += [f"## {verb}", "", text, "", *markdown_rows(["step", "what it does"], rows), ""]
    return "\n".join(lines)


def method_page(method: type[Step], evidence: str = "") -> str:
    """Return the page of a method. All pages have the same sections in the same order; a section without content is left out.

    Args:
        method: The method.
        evidence: What was measured of it in this repository, as Markdown.
    """
    described = describe(method)
    laws = described.laws
    paragraphs = [" ".join(part.split()) for part in _uncited(method).split("\n\n")]
    lines = [f"# {described.verb}: {described.name}", ""]
    for paragraph in paragraphs:
        lines += [paragraph, ""]
    if described.formula:
        lines += ["## Formula", "", f"```text\n{described.formula}\n```", ""]
    lines += ["## Fields", "", *_own_fields(method, described.fields), ""]
    if isinstance(laws, Laws):
        holds = ", ".join(name.replace("_", " ") for name, value in laws if value is True)
        lines += ["## Properties", "", f"Checked by a test: {holds}.", ""] if holds else []
        needs = f" It needs {_NEEDS[laws.needs]}." if laws.needs != "tensor" else ""
        passes = "once" if laws.passes == 1 else f"{laws.passes} times"
        lines += ["## Cost", "", f"Holds {_MEMORY[laws.memory]}; reads every delta {passes}.{needs}", ""]
    lines += ["## Evidence here", "", evidence, ""] if evidence else []
    lines += ["## Source", "", f"{described.paper}.".replace("..", "."), ""] if described.paper else []
    return "\n".join(lines)


def _uncited(method: type[Step]) -> str:
    """Return a method's docstring without references to its paper, which its page names below."""

    def kept(found: re.Match[str]) -> str:
        return "" if found["who"] in method.paper else found[0]

    return re.sub(r"\s\((?P<who>[^()]*?\d{4})[^()]*\)", kept, inspect.getdoc(method) or "")


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
    more = [f"[{_SHARED[name]}](shared.md#{_anchor(_SHARED[name])}) {', '.join(names)}" for name, names in shared.items()]
    return [
        *(_table(own) if own else ["None of its own."]),
        "",
        f"Shared fields: {'; '.join(more)}.",
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
        for field in fields_of(method):
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
    shared, text = list(fields_of(base)), inspect.getdoc(base) or ""
    own = {method: [field for field in fields_of(method) if field not in shared] for method in family}
    lines = [f"# {family[0].verb}: {', '.join(method.name for method in family)}", "", *text.split("\n"), ""]
    each = [
        [f"`{method.name}`", f"`{_starred(method.formula)}`", _starred(_uncited(method)), _starred(method.paper)]
        for method in family
    ]
    lines += [*markdown_rows(["step", "formula", "what it does", "source"], each), ""]
    if apart := [[f"`{method.name}`", *_cells(field)] for method in family for field in own[method]]:
        lines += ["## Fields of one method", "", *markdown_rows(["step", "field", "default", "meaning"], apart), ""]
    lines += ["## Fields", "", *_table(shared), ""]
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
        *_table(fields_of(recipe_model())),
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


def pages(evidence: Mapping[str, str]) -> dict[str, str]:
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


def _starred(text: str) -> str:
    return text.replace("*", "\\*")


def _cells(field: FieldDescription) -> list[str]:
    return [f"`{field.name}`", _starred(field.default), _starred(field.text)]


def _table(rows: Iterable[FieldDescription]) -> list[str]:
    return markdown_rows(["field", "default", "meaning"], map(_cells, rows))

"""Translation of mergekit's parameter values (numbers, gradients over layers, filters) to values of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from workbench import yamldoc
from workbench.merge.mergekit.table import Parameter
from workbench.models.layout import Layout
from workbench.recipe.mergekit.config import ImportReport, Scope

Setting = Any
"""A Boolean, a number, `{knots: [...]}` or a list of `{where:, value:}`, as plain data of a recipe."""
_SCALARS = (bool, int, float, str)
_LAYERS = {"layers": ":"}
"""Selects all layers, without embeddings, final norm and head, which belong to no layer."""


class Names(Protocol):
    """Names of tensors with their layers: a model, or a part of one."""

    @property
    def layout(self) -> Layout:
        """The layers."""


@dataclass(frozen=True)
class Part:
    """Names of the tensors of one part of the result, such as a slice.

    Attributes:
        layout: Their layers.
        in_layers: Whether the part is a range of layers, or lies outside of them.
        unknown: Whether the names are not known, because the model is not local.
    """

    layout: Layout
    in_layers: bool
    unknown: bool = False


class ParameterEntry(NamedTuple):
    """A value for the tensors whose names contain `filter`, or for all tensors if it is None. The first match wins."""

    filter: str | None
    value: Any
    path: yamldoc.KeyPath


def setting(parameter: Parameter, scopes: Iterable[Scope], model: Names | None, report: ImportReport) -> Setting | None:
    """Translate a parameter to a recipe's value; None if the file does not set it.

    mergekit uses the first filter that matches, level by level from the innermost; a list in a recipe uses the last rule. A
    gradient runs over the layers; for embeddings, final norm and head mergekit uses its first value.

    Args:
        parameter: Kind and default of the parameter.
        scopes: The levels that can set it, in the order of precedence.
        model: The base, if its files are local; rules that match none of its tensors are then omitted.
        report: Collects problems and notes.
    """
    entries = entries_of(parameter, scopes, report)
    if model is not None:
        entries = [entry for entry in entries if _matches(entry, model, report)]
    if not entries:
        return None
    if parameter.kind != "float":
        return _one_value(parameter, entries, report)
    if entries[-1].filter is not None and parameter.required:
        report.refuse(entries[-1].path, "no value for tensors that no filter matches, and no default; mergekit rejects this too")
        return None
    if entries[-1].filter is not None and parameter.default is not None:
        entries.append(ParameterEntry(None, float(parameter.default), entries[-1].path))
    rules = [rule for entry in reversed(entries) for rule in _rules(entry, model)]
    return rules[0]["value"] if len(rules) == 1 and not rules[0]["where"] else rules


def complement(value: Setting) -> Setting:
    """Return 1 - value for every tensor."""
    if isinstance(value, list):
        return [{**rule, "value": complement(rule["value"])} for rule in value]
    if isinstance(value, dict):
        return {"knots": [complement(knot) for knot in value["knots"]]}
    return round(1.0 - value, 12)


def _entries(name: str, scopes: Iterable[Scope], report: ImportReport) -> list[ParameterEntry]:
    """Return all values of a parameter in the order in which mergekit tries them, up to the first one without a filter."""
    collected: list[ParameterEntry] = []
    for key_path, parameters in scopes:
        if name not in parameters:
            continue
        value, path = parameters[name], (*key_path, name)
        conditions = [value] if isinstance(value, dict) else value
        if isinstance(conditions, list) and conditions and all(isinstance(c, dict) for c in conditions):
            for i, condition in enumerate(conditions):
                where = path if isinstance(value, dict) else (*path, i)
                if "value" not in condition or condition["value"] == []:
                    report.refuse(where, "expected {filter:, value:}")
                    continue
                chosen = condition.get("filter")
                has_no_filter = chosen is None or chosen == "*"
                collected.append(ParameterEntry(None if has_no_filter else str(chosen), condition["value"], where))
                if has_no_filter:
                    return collected
        elif value != []:
            collected.append(ParameterEntry(None, value, path))
            return collected
    return collected


def entries_of(parameter: Parameter, scopes: Iterable[Scope], report: ImportReport) -> list[ParameterEntry]:
    """Return the values of a parameter in the order in which mergekit tries them, converted to its kind: mergekit reads "1e-5" as a number."""
    done = []
    for entry in _entries(parameter.name, scopes, report):
        values = entry.value if isinstance(entry.value, list) else [entry.value]
        if not all(isinstance(v, _SCALARS) for v in values):
            expected = "expected a value, a list of values or a list of {filter:, value:}"
            report.refuse(entry.path, f"{expected}, found {entry.value!r}")
            continue
        try:
            checked = [parameter.validate(v) for v in values]
        except ValueError:
            report.refuse(entry.path, f"expected {parameter.kind}, found {entry.value!r}")
            continue
        done.append(ParameterEntry(entry.filter, checked if len(checked) > 1 else checked[0], entry.path))
    return done


def _one_value(parameter: Parameter, entries: list[ParameterEntry], report: ImportReport) -> Setting | None:
    """Return the single value of a parameter that a recipe cannot set per tensor."""
    values = {v for entry in entries for v in (entry.value if isinstance(entry.value, list) else [entry.value])}
    if entries[-1].filter is not None and parameter.default is not None:
        values.add(parameter.default)
    if len(values) == 1:
        return values.pop()
    report.refuse(entries[0].path, f"{parameter.name} differs between tensors; a step has one value for all")
    return None


def _rules(entry: ParameterEntry, model: Names | None) -> list[dict[str, Any]]:
    """Translate an entry to one rule, or to two rules for a gradient that also applies to tensors outside the layers."""
    where = {} if entry.filter is None else {"include": [glob_of(entry.filter)]}
    if not isinstance(entry.value, list):
        return [{"where": where, "value": entry.value}]
    gradient: Setting = {"knots": list(entry.value)}
    if model is not None and model.layout.depth == 1:
        gradient = entry.value[-1]  # the only layer is the last one to mergekit
    in_layers, outside_layers = _places(entry.filter, model)
    if not outside_layers or (entry.value[0] == entry.value[-1] and isinstance(gradient, dict)):
        return [{"where": where, "value": gradient}]
    first = {"where": where, "value": entry.value[0]}
    return [first, {"where": {**where, **_LAYERS}, "value": gradient}] if in_layers else [first]


def _places(text: str | None, model: Names | None) -> tuple[bool, bool]:
    """Return whether a filter matches tensors inside layers, and tensors outside of them; both are True without a model."""
    if model is None:
        return True, True
    if isinstance(model, Part) and model.unknown:
        return model.in_layers, not model.in_layers
    matches = {model.layout.layer(name) is not None for name in model.layout.names if text is None or text in name}
    return True in matches, False in matches


def _matches(entry: ParameterEntry, model: Names, report: ImportReport) -> bool:
    """Return whether an entry's filter matches a tensor of the base; add a note if not."""
    if entry.filter is None or any(_places(entry.filter, model)):
        return True
    if not isinstance(model, Part):  # a filter that matches nothing in one slice may match in others
        report.note(entry.path, f"filter {entry.filter!r} matches no tensor of the base, so it is omitted")
    return False


def glob_of(text: str) -> str:
    """Convert a substring to a glob pattern."""
    return "*" + "".join(f"[{c}]" if c in "*?[" else c for c in text) + "*"


def is_default(value: Setting | None, default: Any) -> bool:
    """Return True if a setting equals the default or is missing."""
    return value is None or (not isinstance(value, (list, Mapping)) and value == default)

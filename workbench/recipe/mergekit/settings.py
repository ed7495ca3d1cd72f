"""mergekit's parameter values - numbers, gradients over layers, filters - as values of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from workbench import yamldoc
from workbench.merge.mergekit.api import Parameter
from workbench.models.layout import Model
from workbench.recipe.mergekit.config import ImportReport, Scope

Setting = Any
"""A bool, a number, `{knots: [...]}` or a list of `{where:, value:}`, as plain data of a recipe."""
_SCALARS = (bool, int, float, str)
_LAYERS = {"layers": ":"}
"""All layers and nothing else: embeddings, final norm and head are in no layer."""


class ParameterEntry(NamedTuple):
    """A value for the tensors whose names hold `filter`; None: for all. Of several the first wins."""

    filter: str | None
    value: Any
    path: yamldoc.KeyPath


def setting(parameter: Parameter, scopes: Iterable[Scope], model: Model | None, report: ImportReport) -> Setting | None:
    """A parameter as a recipe says it; None where the file says nothing.

    mergekit takes the first filter that matches, level by level from the innermost; a recipe's list takes the last rule. A
    gradient runs over the layers; outside of them (embeddings, final norm, head) mergekit takes its first value.

    Args:
        parameter: Its kind and default.
        scopes: The levels that may set it, the one that wins first.
        model: The base where its files are at hand: rules that match no tensor are then left out.
        report: Takes what cannot be carried over.
    """
    entries = _converted(parameter, _entries(parameter.name, scopes, report), report)
    if model is not None:
        entries = [entry for entry in entries if _matches(entry, model, report)]
    if not entries:
        return None
    if parameter.kind != "float":
        return _one_value(parameter, entries, report)
    if entries[-1].filter is not None and parameter.required:
        report.refuse(entries[-1].path, "no value for tensors that no filter matches, and no default; mergekit stops there too")
        return None
    if entries[-1].filter is not None and parameter.default is not None:
        entries.append(ParameterEntry(None, float(parameter.default), entries[-1].path))
    rules = [rule for entry in reversed(entries) for rule in _rules(entry, model)]
    return rules[0]["value"] if len(rules) == 1 and not rules[0]["where"] else rules


def complement(value: Setting) -> Setting:
    """1 - value, at every tensor."""
    if isinstance(value, list):
        return [{**rule, "value": complement(rule["value"])} for rule in value]
    if isinstance(value, dict):
        return {"knots": [complement(knot) for knot in value["knots"]]}
    return round(1.0 - value, 12)


def _entries(name: str, scopes: Iterable[Scope], report: ImportReport) -> list[ParameterEntry]:
    """All values of a parameter in the order that mergekit tries them, up to the first without a filter."""
    found: list[ParameterEntry] = []
    for at, parameters in scopes:
        if name not in parameters:
            continue
        value, path = parameters[name], (*at, name)
        conditions = [value] if isinstance(value, dict) else value
        if isinstance(conditions, list) and conditions and all(isinstance(c, dict) for c in conditions):
            for i, condition in enumerate(conditions):
                where = path if isinstance(value, dict) else (*path, i)
                if "value" not in condition or condition["value"] == []:
                    report.refuse(where, "expected {filter:, value:}")
                    continue
                chosen = condition.get("filter")
                every = chosen is None or chosen == "*"
                found.append(ParameterEntry(None if every else str(chosen), condition["value"], where))
                if every:
                    return found
        elif value != []:
            found.append(ParameterEntry(None, value, path))
            return found
    return found


def _converted(parameter: Parameter, entries: list[ParameterEntry], report: ImportReport) -> list[ParameterEntry]:
    """Scalars as the parameter's kind, the way mergekit converts them: "1e-5" is a number to it."""
    done = []
    for entry in entries:
        values = entry.value if isinstance(entry.value, list) else [entry.value]
        if not all(isinstance(v, _SCALARS) for v in values):
            report.refuse(
                entry.path, f"expected a value, a list of values or a list of {{filter:, value:}}, found {entry.value!r}"
            )
            continue
        try:
            checked = [parameter.validate(v) for v in values]
        except ValueError:
            report.refuse(entry.path, f"expected {parameter.kind}, found {entry.value!r}")
            continue
        done.append(ParameterEntry(entry.filter, checked if len(checked) > 1 else checked[0], entry.path))
    return done


def _one_value(parameter: Parameter, entries: list[ParameterEntry], report: ImportReport) -> Setting | None:
    """What a recipe takes once for all tensors."""
    values = {v for entry in entries for v in (entry.value if isinstance(entry.value, list) else [entry.value])}
    if entries[-1].filter is not None and parameter.default is not None:
        values.add(parameter.default)
    if len(values) == 1:
        return values.pop()
    report.refuse(entries[0].path, f"{parameter.name} differs between tensors; a step has one value for all")
    return None


def _rules(entry: ParameterEntry, model: Model | None) -> list[dict[str, Any]]:
    """One rule, or two for a gradient that also reaches tensors outside the layers."""
    where = {} if entry.filter is None else {"include": [_glob(entry.filter)]}
    if not isinstance(entry.value, list):
        return [{"where": where, "value": entry.value}]
    gradient: Setting = {"knots": list(entry.value)}
    if model is not None and model.layout.depth == 1:
        gradient = entry.value[-1]  # the only layer is the last one to mergekit
    inside, outside = _places(entry.filter, model)
    if not outside or (entry.value[0] == entry.value[-1] and isinstance(gradient, dict)):
        return [{"where": where, "value": gradient}]
    first = {"where": where, "value": entry.value[0]}
    return [first, {"where": {**where, **_LAYERS}, "value": gradient}] if inside else [first]


def _places(text: str | None, model: Model | None) -> tuple[bool, bool]:
    """Whether a filter's tensors lie inside the layers, and outside of them; both where the model is not at hand."""
    if model is None:
        return True, True
    found = {model.layout.layer(name) is not None for name in model.layout.names if text is None or text in name}
    return True in found, False in found


def _matches(entry: ParameterEntry, model: Model, report: ImportReport) -> bool:
    if entry.filter is None or any(_places(entry.filter, model)):
        return True
    report.note(entry.path, f"filter {entry.filter!r} matches no tensor of the base: left out")
    return False


def _glob(text: str) -> str:
    """A substring as a glob."""
    return "*" + "".join(f"[{c}]" if c in "*?[" else c for c in text) + "*"


def is_default(value: Setting | None, default: Any) -> bool:
    """Whether a setting says what holds anyway."""
    return value is None or (not isinstance(value, (list, Mapping)) and value == default)

"""Translation of mergekit's methods and of their parameter values: numbers, gradients over layers, filters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from workbench.exchange.mergekit.config import Config, ImportReport, ModelSource, Scope
from workbench.ground import yamldoc
from workbench.ground.errors import nearest
from workbench.merge.mergekit.table import KNOWN, Parameter, base_policy, parameters
from workbench.models.layout import Layout

Step = dict[str, object]


@dataclass(frozen=True)
class MethodInputs:
    """A mergekit configuration with a brick name for each input.

    Attributes:
        config: The configuration.
        bricks: Brick -> input, in mergekit's order, without the base if the method uses it as base.
        base_brick: Name of the base as a brick, for methods that merge it like another model.
        model: The base, or the part of it that is merged, if its files are local.
    """

    config: Config
    bricks: Mapping[str, ModelSource]
    base_brick: str
    model: Names | None

    def known(self) -> dict[str, Parameter]:
        """Return the method's parameters as mergekit specifies them."""
        return parameters(self.config.method)

    def shared(self, name: str) -> Setting:
        """Return a parameter for all bricks, or mergekit's default if the file does not set it."""
        value = setting(self.known()[name], self.config.scopes, self.model, self.config.report)
        return self.known()[name].default if value is None else value

    def each(self, name: str) -> dict[str, Setting]:
        """Return the value of a parameter for each brick."""
        parameter, values = self.known()[name], {}
        for brick, source in self.bricks.items():
            value = setting(parameter, [source.parameters, *self.config.scopes], self.model, self.config.report)
            if value is None and parameter.required and not self.config.report.problems:
                self.config.report.refuse(source.path, f"{self.config.method} requires a {name} here; mergekit rejects this too")
            values[brick] = parameter.default if value is None else value
        return values

    def note_unused(self, used: Sequence[str]) -> None:
        """Add a note for each parameter in the file that mergekit does not use either."""
        parameters, method, report = self.known(), self.config.method, self.config.report
        sources = [source.parameters for source in self.config.sources]
        for key_path, mapping in [*self.config.scopes, *sources]:
            is_input = (key_path, mapping) in sources
            for name in mapping:
                if name not in parameters:
                    close = f" ({nearest(name, parameters)})" if nearest(name, parameters).startswith("Did") else ""
                    report.note(
                        (*key_path, name), f"{method} has no such parameter and mergekit ignores it{close}, so it is omitted"
                    )
                elif is_input and not parameters[name].per_brick:
                    report.note(
                        (*key_path, name), "applies to all inputs, so mergekit ignores it for one input, and it is omitted"
                    )
                elif name not in used:
                    report.note((*key_path, name), f"has no effect on the result of {method}, so it is omitted")


def step_of(inputs: MethodInputs) -> Step:
    """Return the merge step as plain data. Problems and notes go to the configuration's report."""
    make = _OWN.get(inputs.config.method)
    step = make(inputs) if make else None
    return step if step is not None else _bridge(inputs)


def _linear(inputs: MethodInputs) -> Step:
    inputs.note_unused(("weight", "normalize"))
    step: Step = {"merge": "linear", "bricks": inputs.each("weight")}
    return step if inputs.shared("normalize") else {**step, "normalize": False}


def _task_arithmetic(inputs: MethodInputs) -> Step | None:
    if inputs.shared("normalize"):
        return None
    inputs.note_unused(("weight", "lambda", "normalize"))
    return {"merge": "task_arithmetic", "bricks": inputs.each("weight"), **_lambda(inputs)}


def _ties(inputs: MethodInputs) -> Step | None:
    if not inputs.shared("normalize") or inputs.shared("rescale"):
        return None
    inputs.note_unused(("weight", "density", "lambda", "normalize", "rescale"))
    inputs.config.report.note(
        (),
        "ties: the fields below select mergekit's variant. Ties are broken differently, which bf16 inputs can show: among equal magnitudes "
        "at the threshold mergekit keeps arbitrary elements, this step the first ones; if the votes for a sign cancel exactly, mergekit "
        "takes plus, this step leaves the element at 0",
    )
    return {
        "merge": "ties",
        **_weights_and_densities(inputs),
        **_lambda(inputs),
        "sign": "mass",
        "weigh": "before",
        "divide": "weight",
        "threshold": "tensor",
    }


def _slerp(inputs: MethodInputs) -> Step:
    inputs.note_unused(("t",))
    t = inputs.shared("t")
    if t is None and not inputs.config.report.problems:
        inputs.config.report.refuse(("merge_method",), "slerp requires the parameter t; mergekit rejects this too")
    (brick,) = inputs.bricks
    return {"merge": "slerp", "bricks": {inputs.base_brick: complement(t or 0.0), brick: t or 0.0}}


def _dare(inputs: MethodInputs, then: str) -> Step:
    inputs.note_unused(("weight", "density", "lambda", "normalize", "rescale"))
    inputs.config.report.note(
        (), "dare: random masks have the same distribution as mergekit's, but are drawn from the recipe's seed, so they differ"
    )
    rescale = "l1" if inputs.shared("rescale") else "none"
    return {"merge": "dare", **_weights_and_densities(inputs), **_lambda(inputs), "rescale": rescale, "then": then}


def _passthrough(inputs: MethodInputs) -> Step | None:
    (scale,) = inputs.each("scale").values()
    if scale is not None:
        return None
    inputs.note_unused(("scale",))
    return {"merge": "task_arithmetic", "bricks": dict.fromkeys(inputs.bricks, 1.0)}


def _bridge(inputs: MethodInputs) -> Step:
    """Return a `mergekit/NAME` step with every parameter that the file sets."""
    parameters, method = inputs.known(), inputs.config.method
    used = [name for name in parameters if name != "int8_mask"]
    inputs.note_unused(used)
    entries: dict[str, dict[str, Setting]] = {brick: {} for brick in inputs.bricks}
    shared: dict[str, Setting] = {}
    for name in used:
        if not parameters[name].per_brick:
            value = _clamped(inputs, name, inputs.shared(name))
            if parameters[name].required and value is None and not inputs.config.report.problems:
                inputs.config.report.refuse(
                    ("merge_method",), f"{method} requires the parameter {name}; mergekit rejects this too"
                )
            if not is_default(value, parameters[name].default):
                shared[name] = value
            continue
        values = {brick: _clamped(inputs, name, value) for brick, value in inputs.each(name).items()}
        if name != "weight" and all(value == next(iter(values.values())) for value in values.values()):
            if not is_default(next(iter(values.values())), parameters[name].default):
                shared[name] = next(iter(values.values()))
            continue
        for brick, value in values.items():
            if value is not None:
                entries[brick][name] = value
    step: Step = {"merge": f"mergekit/{method}", "bricks": _plain(entries)}
    if shared:
        step["parameters"] = shared
    if KNOWN[method].laws.random:
        inputs.config.report.note(
            (), f"{method}: random numbers come from the recipe's seed and do not depend on the order of models or tensors"
        )
    if base_policy(method) == "optional" and inputs.config.base is None:
        step["with_base"] = False
    return step


def _weights_and_densities(inputs: MethodInputs) -> dict[str, object]:
    weights = inputs.each("weight")
    densities = {brick: _clamped(inputs, "density", value) for brick, value in inputs.each("density").items()}
    first = next(iter(densities.values()))
    if all(value == first for value in densities.values()):
        return {"bricks": weights, "density": first}
    return {"bricks": {brick: {"weight": weights[brick], "density": densities[brick]} for brick in weights}, "density": 1.0}


def _lambda(inputs: MethodInputs) -> dict[str, object]:
    value = inputs.shared("lambda")
    return {} if is_default(value, 1.0) else {"lambda": value}


def _clamped(inputs: MethodInputs, name: str, value: Setting) -> Setting:
    """Limit a share to 1, as mergekit does; a recipe does not allow more."""
    if name not in ("density", "select_topk") or isinstance(value, (list, dict)) or value is None or value <= 1:
        return value
    inputs.config.report.note((), f"{name} {value:g}: mergekit takes it as 1")
    return 1.0


def _plain(entries: dict[str, dict[str, Setting]]) -> Any:
    """Shorten brick entries: a number if there is only a weight, a list of names if no brick has fields."""
    if not any(entries.values()):
        return list(entries)
    return {brick: entry["weight"] if list(entry) == ["weight"] else entry for brick, entry in entries.items()}


_OWN: dict[str, Callable[[MethodInputs], Step | None]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "slerp": _slerp,
    "dare_linear": lambda inputs: None if inputs.shared("normalize") else _dare(inputs, "sum"),
    "dare_ties": lambda inputs: _dare(inputs, "ties") if inputs.shared("normalize") else None,
    "passthrough": _passthrough,
}


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
    for key_path, given in scopes:
        if name not in given:
            continue
        value, path = given[name], (*key_path, name)
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


def _rules(entry: ParameterEntry, model: Names | None) -> list[dict[str, object]]:
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

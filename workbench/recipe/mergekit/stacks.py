"""mergekit's `passthrough` of layer ranges of one model, as a `grow: stack` step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench import yamldoc
from workbench.recipe.mergekit.config import Config, ImportReport, ModelSource, Reference, note_unknown, read_reference


def is_stack(data: Any) -> bool:
    """Whether a mergekit configuration stacks layers anew: `passthrough` with several slices, or with one that does not start at 0."""
    if not isinstance(data, Mapping) or data.get("merge_method") != "passthrough":
        return False
    slices = _slices(data)[1]
    return isinstance(slices, list) and (len(slices) > 1 or any(s != 0 for s in _starts(slices)))


def read_stack(document: yamldoc.Document) -> tuple[Config, dict[str, Any]]:
    """The one model of the slices as the configuration's base, and the step.

    Errors: slices of several models, of several inputs, factors that vary over layers; everything at once, each at its place.
    """
    report, data = ImportReport(document), document.data
    at, slices = _slices(data)
    models: dict[Reference, yamldoc.KeyPath] = {}
    found = []
    for i, entry in enumerate(slices):
        where = (*at, i)
        sources = entry.get("sources") if isinstance(entry, Mapping) else None
        if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], Mapping):
            report.refuse(where, "expected one source: passthrough takes exactly 1 model a slice")
            continue
        note_unknown(report, where, entry, ("sources", "parameters", "residual_weight"))
        source, place = sources[0], (*where, "sources", 0)
        note_unknown(report, place, source, ("model", "layer_range", "parameters"))
        reference = read_reference(report, source.get("model"), (*place, "model"))
        if reference is not None:
            models.setdefault(reference, (*place, "model"))
        span = source.get("layer_range")
        if not (isinstance(span, list) and len(span) == 2 and all(isinstance(n, int) for n in span)):
            report.refuse((*place, "layer_range"), f"expected [first, end], found {span}")
            continue
        # The narrowest scope that says something of `scale` wins, as in mergekit.
        scopes = ((source, place), (entry, where), (data, ()))
        scale = next((s for scope, p in scopes if (s := _scale(report, scope, p)) is not None), {})
        found.append({"layers": span, **({"scale": scale} if scale else {})})
    for reference, place in list(models.items())[1:]:
        report.refuse(place, f"{reference}: the first slice is of {next(iter(models))}; `grow: stack` takes layers of one model")
    for reference, place in models.items():
        if reference.lora:
            report.refuse(place, f"{reference}: bake the adapter into the model first (`workbench brick bake`)")
    report.stop()
    ((model, place),) = models.items()
    config = Config(data, "passthrough", model, [ModelSource(model, place, ((), {}))], [], None, report)
    return config, {"grow": "stack", "slices": found}


def _slices(data: Mapping[str, Any]) -> tuple[yamldoc.KeyPath, Any]:
    module = (data.get("modules") or {}).get("default") if isinstance(data.get("modules"), Mapping) else None
    if isinstance(module, Mapping):
        return ("modules", "default", "slices"), module.get("slices")
    return ("slices",), data.get("slices")


def _starts(slices: list[Any]) -> list[Any]:
    found = []
    for entry in slices:
        for source in (entry.get("sources") if isinstance(entry, Mapping) else None) or []:
            span = source.get("layer_range") if isinstance(source, Mapping) else None
            found.append(span[0] if isinstance(span, list) and span else None)
    return found


def _scale(report: ImportReport, scope: Mapping[str, Any], at: yamldoc.KeyPath) -> dict[str, float] | None:
    """Glob -> factor, the first that matches; None where a scope says nothing of it."""
    parameters = scope.get("parameters") or {}
    for name in parameters if isinstance(parameters, Mapping) else ():
        if name != "scale":
            report.note((*at, "parameters", name), "passthrough does not read it: left out")
    value = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if value is None:
        return None
    rules = value if isinstance(value, list) else [{"value": value}]
    found: dict[str, float] = {}
    for rule in rules:
        if not isinstance(rule, Mapping) or not isinstance(rule.get("value"), (int, float)):
            report.refuse((*at, "parameters", "scale"), f"found {value}: only numbers and rules {{filter:, value:}} carry over")
            return {}
        glob = f"*{rule['filter']}*" if rule.get("filter") not in (None, "*") else "*"
        found.setdefault(glob, float(rule["value"]))
    return {glob: factor for glob, factor in found.items() if factor != 1 or len(found) > 1}

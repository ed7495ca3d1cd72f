"""Translation of mergekit's `passthrough` with layer ranges of one model to a `grow: stack` step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench import yamldoc
from workbench.recipe.mergekit.config import Config, ImportReport, ModelSource, Reference, note_unknown, read_reference


def is_stack(data: Any) -> bool:
    """Return True if a configuration stacks layers: `passthrough` with several slices, or with one that starts after layer 0."""
    if not isinstance(data, Mapping) or data.get("merge_method") != "passthrough":
        return False
    slices = _slices(data)[1]
    return isinstance(slices, list) and (len(slices) > 1 or any(s != 0 for s in _first_layers(slices)))


def read_stack(document: yamldoc.Document) -> tuple[Config, dict[str, Any]]:
    """Read a `passthrough` file.

    Returns:
        The configuration with the model of the slices as base, and the step as plain data.

    Raises:
        WorkbenchError: If slices use several models or inputs, or factors vary over layers; the message lists all with their
            lines.
    """
    report, data = ImportReport(document), document.data
    key_path, slices = _slices(data)
    models: dict[Reference, yamldoc.KeyPath] = {}
    stacked = []
    for i, entry in enumerate(slices):
        where = (*key_path, i)
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
        # The innermost scope that sets `scale` wins, as in mergekit.
        scopes = ((source, place), (entry, where), (data, ()))
        scale = next((s for scope, p in scopes if (s := _scale(report, scope, p)) is not None), {})
        stacked.append({"layers": span, **({"scale": scale} if scale else {})})
    for reference, place in list(models.items())[1:]:
        report.refuse(place, f"{reference}: the first slice is of {next(iter(models))}; `grow: stack` takes layers of one model")
    for reference, place in models.items():
        if reference.lora:
            report.refuse(place, f"{reference}: bake the adapter into the model first (`workbench brick bake`)")
    report.stop()
    ((model, place),) = models.items()
    config = Config(data, "passthrough", model, [ModelSource(model, place, ((), {}))], [], None, report)
    return config, {"grow": "stack", "slices": stacked}


def _slices(data: Mapping[str, Any]) -> tuple[yamldoc.KeyPath, Any]:
    """Return the path of the slices in the file, and the slices."""
    module = (data.get("modules") or {}).get("default") if isinstance(data.get("modules"), Mapping) else None
    if isinstance(module, Mapping):
        return ("modules", "default", "slices"), module.get("slices")
    return ("slices",), data.get("slices")


def _first_layers(slices: list[Any]) -> list[Any]:
    """Return the first layer of each slice, or None where it is not stated."""
    starts = []
    for entry in slices:
        for source in (entry.get("sources") if isinstance(entry, Mapping) else None) or []:
            span = source.get("layer_range") if isinstance(source, Mapping) else None
            starts.append(span[0] if isinstance(span, list) and span else None)
    return starts


def _scale(report: ImportReport, scope: Mapping[str, Any], key_path: yamldoc.KeyPath) -> dict[str, float] | None:
    """Return the factors of a scope as glob -> factor, where the first match wins; None if the scope does not set `scale`."""
    parameters = scope.get("parameters") or {}
    for name in parameters if isinstance(parameters, Mapping) else ():
        if name != "scale":
            report.note((*key_path, "parameters", name), "passthrough does not use it, so it is omitted")
    value = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if value is None:
        return None
    rules = value if isinstance(value, list) else [{"value": value}]
    factors: dict[str, float] = {}
    for rule in rules:
        if not isinstance(rule, Mapping) or not isinstance(rule.get("value"), (int, float)):
            report.refuse((*key_path, "parameters", "scale"), f"expected a number or rules {{filter:, value:}}, found {value}")
            return {}
        glob = f"*{rule['filter']}*" if rule.get("filter") not in (None, "*") else "*"
        factors.setdefault(glob, float(rule["value"]))
    return {glob: factor for glob, factor in factors.items() if factor != 1 or len(factors) > 1}

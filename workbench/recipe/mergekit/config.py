"""A mergekit configuration as mergekit reads it: inputs, base, and parameters by level; what it has beside is refused or noted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench import yamldoc
from workbench.errors import WorkbenchError, nearest
from workbench.merge.mergekit.table import KNOWN

TOP = ("models", "slices", "modules", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
       "tokenizer", "chat_template")  # fmt: skip
Scope = tuple[yamldoc.KeyPath, Mapping[str, Any]]
"""Parameters at one level of the file, and where they stand."""


@dataclass
class ImportReport:
    """What does not carry over: problems stop the import, notes are said and written as comments."""

    document: yamldoc.Document
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, path: yamldoc.KeyPath, text: str) -> None:
        """The recipe would not give mergekit's numbers."""
        self.problems.append(self.document.error(path, text).message)

    def note(self, path: yamldoc.KeyPath, text: str) -> None:
        """The numbers are the same, but the reader should know."""
        line = self.document.at(path).rsplit(":", 2)[1]
        said = f"line {line}, {'.'.join(map(str, path))}: {text}" if path else text
        if said not in self.notes:
            self.notes.append(said)

    def stop(self) -> None:
        """Raise all problems at once. Nothing has been written."""
        if self.problems:
            raise WorkbenchError(
                "\n".join(dict.fromkeys(self.problems)), "Change these fields, or run this file with mergekit itself.", 2
            )


@dataclass(frozen=True)
class Reference:
    """A model as mergekit names it: `path[@revision][+lora[@revision]]`."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else self.model


@dataclass(frozen=True)
class ModelSource:
    """An input of the merge, with the parameters that stand beside it."""

    reference: Reference
    path: yamldoc.KeyPath
    parameters: Scope
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Config:
    """What mergekit would merge.

    Attributes:
        base: `base_model`, also where it is not among the inputs.
        sources: The inputs in mergekit's order; the base is among them where mergekit would add it.
        scopes: Parameters for all inputs, the ones that win first: slice, module, top level.
        layers: Number of layers that `slices` states.
    """

    data: Mapping[str, Any]
    method: str
    base: Reference | None
    sources: list[ModelSource]
    scopes: list[Scope]
    layers: int | None
    report: ImportReport


def read_config(document: yamldoc.Document) -> Config:
    """Read and check the whole file. Errors: everything that cannot be carried over, at once, each at its place."""
    report = ImportReport(document)
    data = document.data
    if not isinstance(data, dict) or "merge_method" not in data:
        hint = "The file should be one that `mergekit-yaml` or `mergekit-moe` runs."
        raise document.error((), "expected a mergekit configuration with a merge_method", hint)
    note_unknown(report, (), data, TOP)
    method = str(data["merge_method"])
    if method not in KNOWN:
        report.refuse(("merge_method",), f"unknown method '{method}'. {nearest(method, KNOWN)}")
    base = read_reference(report, data.get("base_model"), ("base_model",)) if data.get("base_model") else None
    body = _body(report, data)
    report.stop()
    assert body is not None
    at, content, module = body
    scopes = [*([_scope(report, module, at)] if module else []), _scope(report, data, ())]
    layers = None
    if content == "slices":
        sources, output, base, layers = _slices(report, (module or data)["slices"], (*at, "slices"), base)
        scopes.insert(0, output)
    else:
        sources = _models(report, (module or data)["models"], (*at, "models"))
        if base and base not in [source.reference for source in sources]:
            sources.append(ModelSource(base, ("base_model",), (("base_model",), {})))
    seen: set[Reference] = set()
    for source in sources:
        if source.reference in seen:
            report.refuse(source.path, f"{source.reference} stands twice among the inputs; mergekit refuses that too")
        seen.add(source.reference)
    report.stop()
    return Config(data, method, base, sources, scopes, layers, report)


def _body(report: ImportReport, data: Mapping[str, Any]) -> tuple[yamldoc.KeyPath, str, Mapping[str, Any] | None] | None:
    """Where the inputs stand: key path, `models` or `slices`, and the module around them."""
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        report.refuse((), f"expected exactly one of models, slices, modules; found {', '.join(given) or 'none'}")
        return None
    if given[0] != "modules":
        return (), given[0], None
    modules = data["modules"]
    names = list(modules) if isinstance(modules, dict) else []
    if names != ["default"]:
        report.refuse(
            ("modules",), f"only a model with one module, `default`, carries over; found {', '.join(map(str, names)) or 'none'}"
        )
        return None
    module = modules["default"]
    inside = [key for key in ("models", "slices") if isinstance(module, dict) and module.get(key)]
    if len(inside) != 1:
        report.refuse(("modules", "default"), f"expected exactly one of models, slices; found {', '.join(inside) or 'none'}")
        return None
    note_unknown(report, ("modules", "default"), module, ("models", "slices", "parameters"))
    return ("modules", "default"), inside[0], module


def _models(report: ImportReport, models: Any, at: yamldoc.KeyPath) -> list[ModelSource]:
    sources = []
    for i, entry in enumerate(models if isinstance(models, list) else []):
        path = (*at, i)
        if not isinstance(entry, dict) or "model" not in entry:
            report.refuse(path, "expected {model:, parameters:}")
            continue
        note_unknown(report, path, entry, ("model", "parameters"))
        reference = read_reference(report, entry["model"], (*path, "model"))
        if reference:
            sources.append(ModelSource(reference, (*path, "model"), _scope(report, entry, path)))
    if not isinstance(models, list):
        report.refuse(at, "expected a list of models")
    return sources


def _slices(
    report: ImportReport, slices: Any, at: yamldoc.KeyPath, base: Reference | None
) -> tuple[list[ModelSource], Scope, Reference | None, int | None]:
    """One slice over all layers is the whole model. Others stack layers anew, which a merge step does not do."""
    none: tuple[list[ModelSource], Scope, Reference | None, int | None] = ([], (at, {}), base, None)
    if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
        count = len(slices) if isinstance(slices, list) else 0
        report.refuse(at, f"{count} slices: of several slices only those of `passthrough`, of one model, carry over")
        return none
    path, output = (*at, 0), slices[0]
    note_unknown(report, path, output, ("sources", "base_model", "parameters", "residual_weight"))
    if output.get("residual_weight") is not None:
        report.note((*path, "residual_weight"), "mergekit reads and never uses it: left out")
    if output.get("base_model"):
        own = read_reference(report, output["base_model"], (*path, "base_model"))
        if base and own != base:
            report.refuse((*path, "base_model"), f"differs from base_model {base}: a recipe has one base")
        base = own
    sources = []
    for i, entry in enumerate(output.get("sources") or []):
        where = (*path, "sources", i)
        if not isinstance(entry, dict) or "model" not in entry or "layer_range" not in entry:
            report.refuse(where, "expected {model:, layer_range:, parameters:}")
            continue
        note_unknown(report, where, entry, ("model", "layer_range", "parameters"))
        span = entry["layer_range"]
        if not (isinstance(span, list) and len(span) == 2 and all(isinstance(n, int) for n in span) and 0 == span[0] < span[1]):
            report.refuse((*where, "layer_range"), f"found {span}: of a merge only [0, number of layers] carries over")
            continue
        reference = read_reference(report, entry["model"], (*where, "model"))
        if reference:
            sources.append(ModelSource(reference, (*where, "model"), _scope(report, entry, where), (0, span[1])))
    ends = {source.layers[1] for source in sources if source.layers}
    if len(ends) > 1:
        report.refuse((*path, "sources"), "the inputs' layer ranges have different lengths; mergekit refuses that too")
    return sources, _scope(report, output, path), base, min(ends, default=None)


def read_reference(report: ImportReport, value: Any, at: yamldoc.KeyPath) -> Reference | None:
    """A model reference as mergekit parses it; None where it is none, which the report then says."""
    if isinstance(value, dict):
        if value.get("override_architecture"):
            report.refuse((*at, "override_architecture"), "the architecture is the checkpoint's own here")
        note_unknown(report, at, value, ("model", "lora", "override_architecture"))
        parts = [_path(report, value[key], (*at, key)) if value.get(key) else None for key in ("model", "lora")]
    elif isinstance(value, str) and 1 <= len(value.split("+")) <= 2:
        parts = [_path(report, part, at) for part in value.split("+")]
    else:
        report.refuse(at, f"expected path[@revision][+lora[@revision]], found {value!r}")
        return None
    model, lora = (*parts, None)[:2]
    if not model:
        report.refuse(at, "names no model")
        return None
    return Reference(model, lora)


def _path(report: ImportReport, value: Any, at: yamldoc.KeyPath) -> str | None:
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    if isinstance(value, str) and value and value.count("@") <= 1:
        return value
    report.refuse(at, f"expected path[@revision], found {value!r}")
    return None


def _scope(report: ImportReport, holder: Mapping[str, Any], at: yamldoc.KeyPath) -> Scope:
    """The parameters of one level."""
    path = (*at, "parameters")
    found = holder.get("parameters")
    if found is not None and not isinstance(found, dict):
        report.refuse(path, "expected a mapping of parameters")
    return path, found if isinstance(found, dict) else {}


def note_unknown(report: ImportReport, at: yamldoc.KeyPath, found: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in found:
        if key not in known:
            report.note((*at, key), "mergekit has no such field and ignores it: left out")

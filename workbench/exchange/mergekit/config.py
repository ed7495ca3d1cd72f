"""Reading of mergekit configurations: inputs, base, parameters by level, and mixtures. Other fields are errors or notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from workbench.ground import yamldoc
from workbench.ground.errors import InvalidRecipeError, nearest
from workbench.merge.mergekit.table import KNOWN

TOP = (
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
Scope = tuple[yamldoc.KeyPath, Mapping[str, object]]
"""Path of a `parameters` mapping in the file, and the mapping."""


@dataclass
class ImportReport:
    """Problems, which stop the import, and notes, which are shown and written as comments."""

    document: yamldoc.Document
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, path: yamldoc.KeyPath, text: str) -> None:
        """Add a problem: without this field, the recipe gives other numbers than mergekit."""
        self.problems.append(self.document.error(path, text).message)

    def note(self, path: yamldoc.KeyPath, text: str) -> None:
        """Add a note: the numbers are the same, but the reader should know about the difference."""
        line = self.document.at(path).rsplit(":", 2)[1]
        note = f"line {line}, {'.'.join(map(str, path))}: {text}" if path else text
        if note not in self.notes:
            self.notes.append(note)

    def stop(self) -> None:
        """Raise WorkbenchError with all problems, if there are any."""
        if self.problems:
            raise InvalidRecipeError(
                "\n".join(dict.fromkeys(self.problems)), "Change these fields, or run the file with mergekit."
            )


@dataclass(frozen=True)
class Reference:
    """A model reference of mergekit: `path[@revision][+lora[@revision]]`."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else self.model


Body: TypeAlias = tuple[yamldoc.KeyPath, str, Mapping[str, object] | None]
"""Location of the inputs: the path above them, `models` or `slices`, and the module that contains them, if any."""


@dataclass(frozen=True)
class ModelSource:
    """An input of the merge, with its own parameters."""

    reference: Reference
    path: yamldoc.KeyPath
    parameters: Scope
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Config:
    """A valid mergekit configuration.

    Attributes:
        data: The file as plain data.
        method: `merge_method`.
        base: `base_model`, even if it is not among the inputs.
        sources: The inputs in mergekit's order, with the base if mergekit adds it.
        scopes: Parameters for all inputs in the order of precedence: slice, module, top level.
        layers: Number of layers that `slices` states.
        report: Collects problems and notes.
    """

    data: Mapping[str, object]
    method: str
    base: Reference | None
    sources: list[ModelSource]
    scopes: list[Scope]
    layers: int | None
    report: ImportReport


def read_config(document: yamldoc.Document) -> Config:
    """Read and check a mergekit file.

    Raises:
        WorkbenchError: If fields cannot be translated; the message lists all of them with their lines.
    """
    report = ImportReport(document)
    data = document.data
    if not isinstance(data, dict) or "merge_method" not in data:
        hint = "Give a file for `mergekit-yaml` or `mergekit-moe`."
        raise document.error((), "expected a mergekit configuration with a merge_method", hint)
    method, base, (above, content, module), scopes = read_top(report, data)
    layers = None
    if content == "slices":
        sources, output, base, layers = _slices(report, (module or data)["slices"], (*above, "slices"), base)
        scopes.insert(0, output)
    else:
        sources = _models(report, (module or data)["models"], (*above, "models"))
        if base and base not in [source.reference for source in sources]:
            sources.append(ModelSource(base, ("base_model",), (("base_model",), {})))
    seen: set[Reference] = set()
    for source in sources:
        if source.reference in seen:
            report.refuse(source.path, f"{source.reference} is listed twice among the inputs; mergekit rejects this too")
        seen.add(source.reference)
    report.stop()
    return Config(data, method, base, sources, scopes, layers, report)


def read_top(report: ImportReport, data: Mapping[str, object]) -> tuple[str, Reference | None, Body, list[Scope]]:
    """Return method, base, the location of the inputs, and the parameters for all inputs in the order of precedence.

    Raises:
        WorkbenchError: If fields cannot be translated; the message lists all of them with their lines.
    """
    note_unknown(report, (), data, TOP)
    method = str(data["merge_method"])
    if method not in KNOWN:
        report.refuse(("merge_method",), f"unknown method '{method}'. {nearest(method, KNOWN)}")
    base = read_reference(report, data.get("base_model"), ("base_model",)) if data.get("base_model") else None
    body = body_of(report, data)
    report.stop()
    assert body is not None
    above, _, module = body
    return method, base, body, [*([scope_of(report, module, above)] if module else []), scope_of(report, data, ())]


def body_of(report: ImportReport, data: Mapping[str, object]) -> Body | None:
    """Return the location of the inputs; None, with a problem in the report, if it is not one."""
    keys = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(keys) != 1:
        report.refuse((), f"expected exactly one of models, slices, modules; found {', '.join(keys) or 'none'}")
        return None
    if keys[0] != "modules":
        return (), keys[0], None
    modules = data["modules"]
    names = list(modules) if isinstance(modules, dict) else []
    if names != ["default"]:
        report.refuse(("modules",), f"expected one module named `default`, found {', '.join(map(str, names)) or 'none'}")
        return None
    module = modules["default"] if isinstance(modules, dict) else None
    present = [key for key in ("models", "slices") if isinstance(module, dict) and module.get(key)]
    if len(present) != 1 or not isinstance(module, dict):
        report.refuse(("modules", "default"), f"expected exactly one of models, slices; found {', '.join(present) or 'none'}")
        return None
    note_unknown(report, ("modules", "default"), module, ("models", "slices", "parameters"))
    return ("modules", "default"), present[0], module


def _models(report: ImportReport, models: Any, key_path: yamldoc.KeyPath) -> list[ModelSource]:
    sources = []
    for i, entry in enumerate(models if isinstance(models, list) else []):
        path = (*key_path, i)
        if not isinstance(entry, dict) or "model" not in entry:
            report.refuse(path, "expected {model:, parameters:}")
            continue
        note_unknown(report, path, entry, ("model", "parameters"))
        reference = read_reference(report, entry["model"], (*path, "model"))
        if reference:
            sources.append(ModelSource(reference, (*path, "model"), scope_of(report, entry, path)))
    if not isinstance(models, list):
        report.refuse(key_path, "expected a list of models")
    return sources


def _slices(
    report: ImportReport, slices: Any, key_path: yamldoc.KeyPath, base: Reference | None
) -> tuple[list[ModelSource], Scope, Reference | None, int | None]:
    """Read the inputs of one slice that starts at layer 0. `layers.read_slices` reads all others."""
    none: tuple[list[ModelSource], Scope, Reference | None, int | None] = ([], (key_path, {}), base, None)
    if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
        count = len(slices) if isinstance(slices, list) else 0
        report.refuse(key_path, f"expected a list with one slice, found {count}")
        return none
    path, output = (*key_path, 0), slices[0]
    note_unknown(report, path, output, ("sources", "base_model", "parameters", "residual_weight"))
    if output.get("residual_weight") is not None:
        report.note((*path, "residual_weight"), "mergekit does not use it, so it is omitted")
    if output.get("base_model"):
        slice_base = read_reference(report, output["base_model"], (*path, "base_model"))
        if base and slice_base != base:
            report.refuse((*path, "base_model"), f"differs from base_model {base}: a recipe has one base")
        base = slice_base
    sources = []
    for i, entry in enumerate(output.get("sources") or []):
        where = (*path, "sources", i)
        if not isinstance(entry, dict) or "model" not in entry or "layer_range" not in entry:
            report.refuse(where, "expected {model:, layer_range:, parameters:}")
            continue
        note_unknown(report, where, entry, ("model", "layer_range", "parameters"))
        span = entry["layer_range"]
        if not (isinstance(span, list) and len(span) == 2 and all(isinstance(n, int) for n in span) and 0 == span[0] < span[1]):
            report.refuse((*where, "layer_range"), f"found {span}: a merge takes only [0, number of layers]")
            continue
        reference = read_reference(report, entry["model"], (*where, "model"))
        if reference:
            sources.append(ModelSource(reference, (*where, "model"), scope_of(report, entry, where), (0, span[1])))
    ends = {source.layers[1] for source in sources if source.layers}
    if len(ends) > 1:
        report.refuse((*path, "sources"), "the inputs' layer ranges have different lengths; mergekit rejects this too")
    return sources, scope_of(report, output, path), base, min(ends, default=None)


def read_reference(report: ImportReport, value: Any, key_path: yamldoc.KeyPath) -> Reference | None:
    """Parse a model reference as mergekit does. Return None and report a problem if it is invalid."""
    if isinstance(value, dict):
        if value.get("override_architecture"):
            report.refuse(
                (*key_path, "override_architecture"), "cannot be translated: the architecture is always the checkpoint's own"
            )
        note_unknown(report, key_path, value, ("model", "lora", "override_architecture"))
        parts = [_path(report, value[key], (*key_path, key)) if value.get(key) else None for key in ("model", "lora")]
    elif isinstance(value, str) and 1 <= len(value.split("+")) <= 2:
        parts = [_path(report, part, key_path) for part in value.split("+")]
    else:
        report.refuse(key_path, f"expected path[@revision][+lora[@revision]], found {value!r}")
        return None
    model, lora = (*parts, None)[:2]
    if not model:
        report.refuse(key_path, "names no model")
        return None
    return Reference(model, lora)


def _path(report: ImportReport, value: Any, key_path: yamldoc.KeyPath) -> str | None:
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    if isinstance(value, str) and value and value.count("@") <= 1:
        return value
    report.refuse(key_path, f"expected path[@revision], found {value!r}")
    return None


def scope_of(report: ImportReport, holder: Mapping[str, object], key_path: yamldoc.KeyPath) -> Scope:
    """Return the parameters of one level with their path."""
    path = (*key_path, "parameters")
    parameters = holder.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        report.refuse(path, "expected a mapping of parameters")
    return path, parameters if isinstance(parameters, dict) else {}


def note_unknown(report: ImportReport, key_path: yamldoc.KeyPath, mapping: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Add a note for each key of a mapping that mergekit does not know."""
    for key in mapping:
        if key not in known:
            report.note((*key_path, key), "mergekit has no such field and ignores it, so it is omitted")


_TOP = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_PROMPTS = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
_RANDOM = ("random", "uniform_random")
_ARCHITECTURES = {"auto": None, "mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
Make = Callable[[Callable[[Reference], str]], dict[str, object]]


def is_mixture(data: Any) -> bool:
    """Return True if a configuration is for `mergekit-moe`."""
    return isinstance(data, Mapping) and "experts" in data and "merge_method" not in data


def read_mixture(document: yamldoc.Document) -> tuple[Config, Make]:
    """Read a mergekit-moe file.

    Returns:
        The configuration with the experts' models as sources, and a function that makes the step from the models' brick names.

    Raises:
        WorkbenchError: If the step lacks a feature (shared experts, noise, factors, a model twice); the message lists all with
            their lines.
    """
    report, data = ImportReport(document), document.data
    note_unknown(report, (), data, _TOP)
    base = read_reference(report, data.get("base_model"), ("base_model",))
    experts = data["experts"] if isinstance(data["experts"], list) else []
    if len(experts) < 2:
        report.refuse(("experts",), f"expected a list of at least two experts, found {len(experts)}")
    if data.get("shared_experts"):
        report.refuse(
            ("shared_experts",),
            "`grow: experts` cannot make shared experts, except one with zero output if the architecture needs it",
        )
    architecture = str(data.get("architecture") or "auto")
    if architecture not in _ARCHITECTURES:
        report.refuse(("architecture",), f"found {architecture!r}; expected one of {', '.join(_ARCHITECTURES)}")
    mode = str(data.get("gate_mode") or "hidden")
    if mode not in (*_PROMPTS, *_RANDOM):
        report.refuse(("gate_mode",), f"found {mode!r}; expected one of {', '.join((*_PROMPTS, *_RANDOM))}")
    read = [_expert(report, entry, ("experts", i), mode) for i, entry in enumerate(experts)]
    members = [member for member in read if member is not None]
    anchors = [key_path for reference, key_path, _ in members if reference == base]
    copies = len(anchors) == len(members)
    seen: set[Reference] = set()
    for reference, key_path, _ in members:
        if reference in seen and not (copies and mode in _RANDOM):
            report.refuse(key_path, f"{reference} is listed twice among the experts")
        seen.add(reference)
    if anchors and not copies and anchors[0][1] != 0:
        report.note(anchors[0], "the base's layers are always the first expert, so experts are numbered differently")
    if mode in _PROMPTS:
        report.note(
            ("gate_mode",) if "gate_mode" in data else (),
            "rows of the router are means of the router's own input, after attention and norm; mergekit-moe reads the layer's input or "
            "embeddings. Experts are the same",
        )
    elif "gate_mode" in data:
        report.note(("gate_mode",), "router rows are drawn with the base's initializer_range, not with deviation 1 or uniformly")
    report.stop()
    assert base is not None
    top = {
        "top_k": data.get("experts_per_token", 2),
        **({"into": _ARCHITECTURES[architecture]} if _ARCHITECTURES[architecture] else {}),
    }
    gate = "prompts" if mode in _PROMPTS else "random"

    def make(name: Callable[[Reference], str]) -> dict[str, object]:
        if copies:
            return {"grow": "experts", "experts": len(members), **top}
        bricks = {
            name(reference): prompts if gate == "prompts" else 1.0 for reference, _, prompts in members if reference != base
        }
        anchor_prompts = next((prompts for reference, _, prompts in members if reference == base and gate == "prompts"), {})
        return {"grow": "experts", "bricks": bricks, "anchor": bool(anchors), **anchor_prompts, "gate": gate, **top}

    sources = [ModelSource(reference, key_path, ((), {})) for reference, key_path, _ in members if reference != base]
    return Config(data, "moe", base, sources, [], None, report), make


def _expert(
    report: ImportReport, entry: Any, key_path: yamldoc.KeyPath, mode: str
) -> tuple[Reference, yamldoc.KeyPath, dict[str, list[str]]] | None:
    """Return an expert's model, its path in the file, and its prompts; None if the entry is invalid."""
    if not isinstance(entry, Mapping) or "source_model" not in entry:
        report.refuse(key_path, "expected {source_model:, positive_prompts:}")
        return None
    note_unknown(report, key_path, entry, _EXPERT)
    if entry.get("noise_scale"):
        report.refuse(
            (*key_path, "noise_scale"),
            "`grow: experts` cannot add noise; for copies, `redraw` re-initializes a share of the neurons",
        )
    if entry.get("residual_scale") not in (None, 1, 1.0):
        report.refuse(
            (*key_path, "residual_scale"), "`grow: experts` cannot scale an expert's output; a brick's weight scales its delta"
        )
    names = {"prompts": "positive_prompts", "negative_prompts": "negative_prompts"}
    prompts = {ours: list(entry[theirs]) for ours, theirs in names.items() if entry.get(theirs)}
    if mode in _PROMPTS and "prompts" not in prompts:
        report.refuse((*key_path, "positive_prompts"), f"gate_mode {mode} needs prompts; mergekit-moe rejects this too")
    reference = read_reference(report, entry["source_model"], (*key_path, "source_model"))
    return None if reference is None else (reference, key_path, prompts)

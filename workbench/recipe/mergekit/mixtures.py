"""Translation of mergekit-moe configurations to a `grow: experts` step with the same experts and a new router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workbench import yamldoc
from workbench.recipe.mergekit.config import Config, ImportReport, ModelSource, Reference, note_unknown, read_reference

_TOP = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_PROMPTS = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
_RANDOM = ("random", "uniform_random")
_ARCHITECTURES = {"auto": None, "mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
Make = Callable[[Callable[[Reference], str]], dict[str, Any]]


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

    def make(name: Callable[[Reference], str]) -> dict[str, Any]:
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

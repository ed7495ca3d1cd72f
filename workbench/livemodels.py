"""Configurations as live transformers models: computed in float32, cast once, loaded under the names they have on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.conversion import live_names, parse_config
from workbench.errors import WorkbenchError
from workbench.layout import Model
from workbench.weights.parallel import load_all
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Events = Callable[[dict[str, Any]], None]


def no_events(_event: dict[str, Any]) -> None:
    """Ignore events."""


_INCOMPLETE = "The base's files are incomplete, or its config.json is of another model: fetch both again."


def compute(model: Model, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a configuration in memory, computed in float32 and cast once; None keeps each tensor's dtype."""
    return load_all(model.weights, dtype, device)


def live_model(config: dict[str, Any], tensors: dict[str, Tensor], source: Path, device: torch.device) -> PreTrainedModel:
    """A transformers model around tensors in memory, under the names that the checkpoint has on disk.

    transformers converts the names (fused experts, prefixes) itself, as if it read them from files.

    Args:
        config: config.json.
        tensors: Name -> tensor; all floats of one dtype. They are used as they are, not copied.
        source: Directory with generation_config.json.
        device: Where the model goes.

    Errors: an architecture without a causal language model, weights that the model needs and the tensors lack.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    parsed = parse_config(config)
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[_decoder(parsed, config)]
    try:
        model, info = kind.from_pretrained(
            None, config=parsed, state_dict=dict(tensors), dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except RuntimeError as error:
        live_names(config, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()})  # names what does not convert
        raise WorkbenchError(
            f"{source}: transformers cannot load these weights ({str(error).strip()[:200]})", _INCOMPLETE
        ) from error
    # A pair is a mismatch: its name, the shape found, the shape expected.
    lost = [name if isinstance(name, str) else name[0] for name in (*info["missing_keys"], *info["mismatched_keys"])]
    if lost:
        raise WorkbenchError(
            f"{source}: {kind.__name__} finds no weight that fits {min(lost)} ({len(lost)} such): its values would be random",
            _INCOMPLETE,
        )
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    live: PreTrainedModel = model.to(device).eval()
    return live


def causal_skeleton(config: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """A transformers model without weights, in eval mode: parameters on the meta device, buffers computed, on `device`."""
    from torch import nn
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    parsed = parse_config(config)
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[_decoder(parsed, config)]._from_config(parsed, dtype=torch.float32)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else value.to(device)
    return model.eval()


def loading_class(config: dict[str, Any]) -> str:
    """Return the name of the transformers class that loads all of a model, for a line that a user runs.

    It is the automatic class that stands for the class in `architectures`, the most usual one first, or that class itself.
    `AutoModelForCausalLM` loads many multimodal models without their towers, so it is only named for classes that it stands for.
    """
    kind, named = config.get("model_type"), (config.get("architectures") or [None])[0]
    if isinstance(named, str) and named.endswith("ForCausalLM"):
        return "AutoModelForCausalLM"
    from transformers.models.auto import modeling_auto

    usual = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    if isinstance(named, str) and "vision_config" not in config and "audio_config" not in config:
        usual = (usual[2], *usual[:2], usual[3])
    others = [name for name in sorted(vars(modeling_auto)) if name.startswith("AutoModelFor") and name not in usual]
    for name in (*usual, *others, "AutoModel"):
        mapping = getattr(getattr(modeling_auto, name, None), "_model_mapping", None)
        stands_for = mapping._model_mapping.get(kind) if mapping is not None else None
        if stands_for and (named is None or named in ((stands_for,) if isinstance(stands_for, str) else stands_for)):
            return str(name)
    return str(named or "AutoModelForCausalLM")


def check_decoder(config: dict[str, Any]) -> None:
    """Errors: a config.json that transformers cannot read, or not of a decoder-only language model."""
    _decoder(parse_config(config), config)


def _decoder(parsed: Any, config: dict[str, Any]) -> type[Any]:
    """The configuration's class. Errors: not that of a decoder-only language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(parsed) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise WorkbenchError(
            f"config.json: model_type {config.get('model_type')} is not a decoder-only language model",
            "Live models (edit, eval, chat) need one; merges by tensor name work all the same.",
        )
    return type(parsed)

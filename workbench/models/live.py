"""Live transformers models of configurations: computed in float32, cast once, and loaded by their names on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.models.conversion import live_names
from workbench.models.layout import Model
from workbench.models.skeleton import _decoder, parse_config, part_for
from workbench.weights.parallel import load_all
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


_INCOMPLETE = "The base's files are incomplete, or its config.json belongs to another model: download both again."


def compute(model: Model, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """Load all tensors of a configuration, computed in float32 and cast once; a dtype of None keeps each tensor's dtype."""
    return load_all(model.weights, dtype, device)


def carries_state(config: dict[str, Any]) -> bool:
    """Return True if a model's layers pass a state from token to token (Mamba, RWKV, hybrids), which no mask can hide from a token.

    Args:
        config: The content of config.json.
    """
    return bool(getattr(_class(parse_config(config), config), "_is_stateful", False))


def _class(parsed: Any, config: dict[str, Any]) -> Any:
    """Return the class of a causal language model in transformers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[_decoder(parsed, config)]


def live_model(config: dict[str, Any], tensors: dict[str, Tensor], source: Path, device: torch.device) -> PreTrainedModel:
    """Return a transformers model with tensors in memory, which have the names of the checkpoint on disk.

    transformers converts names (fused experts, prefixes) itself, as if it read the tensors from files.

    Args:
        config: The content of config.json.
        tensors: Name -> tensor; all floating-point tensors have the same dtype. They are used without a copy.
        source: Directory with generation_config.json, which may be missing.
        device: The device of the model.

    Raises:
        WorkbenchError: If the architecture is not a causal language model, or if the tensors lack weights that the model needs.
    """
    from transformers import GenerationConfig

    parsed = parse_config(config)
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    kind = _class(parsed, config)
    try:
        model, info = kind.from_pretrained(
            None,
            config=part_for(kind, parsed),
            state_dict=dict(tensors),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        live_names(
            config, {n: TensorSpec.of(t.shape, t.dtype) for n, t in tensors.items()}
        )  # raises an error that names the tensor
        raise WorkbenchError(
            f"{source}: transformers cannot load these weights ({str(error).strip()[:200]})", _INCOMPLETE
        ) from error
    # A mismatch is a tuple: name, actual shape, expected shape.
    missing = [name if isinstance(name, str) else name[0] for name in (*info["missing_keys"], *info["mismatched_keys"])]
    if missing:
        raise WorkbenchError(
            f"{source}: no tensor fits {min(missing)} of {kind.__name__} ({len(missing)} such tensors): its values would be random",
            _INCOMPLETE,
        )
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    live: PreTrainedModel = model.to(device).eval()
    return live

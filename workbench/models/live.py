"""Configurations as live transformers models: computed in float32, cast once, loaded under the names they have on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import WorkbenchError
from workbench.models.conversion import live_names
from workbench.models.layout import Model
from workbench.models.skeleton import _decoder, parse_config
from workbench.weights.parallel import load_all
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


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

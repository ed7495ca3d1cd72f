"""Check of the written files of a multimodal model: transformers loads them, and its text decoder is the model before the step."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import GateFailedError, WorkbenchError
from workbench.grow.expansion.preserve import TOLERANCES, prompts, same_logits
from workbench.lazy import torch
from workbench.models.live import compute, live_model
from workbench.models.skeleton import loading_class
from workbench.run.grown import GrownStep
from workbench.weights.checkpoint import read_config

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.resolve.resolved import Resolved

_OFF_COMPOSED = "If the models were made for different settings, set `base` to the text model of this architecture. `check: off` skips this check."


def check_composed(resolved: Resolved, grown: Sequence[GrownStep], place: Path, device: torch.device) -> dict[str, Any]:
    """Load the written model and compare its answers to texts with those of the text model that was put into it.

    A difference means that config.json of the brick gives the text decoder other settings than the base has, such as another base of
    the rotary positions.

    Args:
        resolved: The recipe.
        grown: The composition's grow steps.
        place: Directory of the files, with config.json.
        device: Device that the models run on.

    Returns:
        `{"max_logit_difference": float}`, in float32.

    Raises:
        WorkbenchError: If transformers cannot load the files, reports missing or unexpected tensors, or logits differ (exit code 3).
    """
    composed = next(g for g in grown if g.step.composes)
    before = composed.before
    written = compute(before, resolved.dtype, device)  # rounded as in the files, then compared in float32
    text = live_model(
        before.config, {n: t.float() if t.is_floating_point() else t for n, t in written.items()}, resolved.base_path, device
    )
    tokens = prompts(text, without=_placeholders(composed.weights.growth.config))
    expected = _logits_of(text, tokens, composed.id)
    del text, written
    gc.collect()
    found = _logits_of(_loaded(place, composed.id).to(device), tokens, composed.id)
    try:
        return same_logits(expected, found, TOLERANCES["exact"], composed.id, ())
    except GateFailedError as error:
        raise GateFailedError(
            f"{error.message} (the text decoder inside the multimodal model, compared with it alone)", _OFF_COMPOSED
        ) from None


def _placeholders(config: Mapping[str, Any]) -> list[int]:
    """Return the tokens that stand for images, video or audio, by config.json."""
    names = [key for key in config if key.endswith(("_token_id", "_token_index")) and not key.startswith(("bos", "eos", "pad"))]
    return [config[key] for key in names if isinstance(config[key], int)]


def _loaded(place: Path, step: str) -> Any:
    """Return the written model in float32."""
    import transformers

    kind = getattr(transformers, loading_class(read_config(place, "result")))
    try:
        model, info = kind.from_pretrained(place, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise GateFailedError(
            f"step {step}: transformers cannot load the written model ({str(error).strip()[:200]})", _OFF_COMPOSED
        ) from None
    wrong = [name if isinstance(name, str) else name[0] for names in info.values() for name in names if name]
    if wrong:
        raise GateFailedError(
            f"step {step}: the written model has {len(wrong)} missing, unexpected or mismatched tensors, such as {min(wrong)}",
            _OFF_COMPOSED,
        )
    return model.eval()


def _logits_of(model: Any, tokens: Tensor, step: str) -> Tensor:
    """Return the logits of texts."""
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens.to(model.device)).logits.float()
        return logits
    except torch.OutOfMemoryError:
        raise
    except (WorkbenchError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise GateFailedError(
            f"step {step}: transformers cannot run the model on a text ({str(error).strip()[:200]})", _OFF_COMPOSED
        ) from None

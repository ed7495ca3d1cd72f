"""Further training of a live model's own parameters: those that have a gradient when it is called."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.models.tokenizer import load_tokenizer
from workbench.train.fit import Notice, Progress, Watch, fit
from workbench.train.given import read_given, scheduled
from workbench.train.heldout import HeldOut
from workbench.train.run import LIBRARIES, final_loss
from workbench.train.spec import TrainSpec
from workbench.train.surroundings import THREADS, quiet, reproducible
from workbench.versions import installed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def train_parameters(
    spec: TrainSpec,
    model: PreTrainedModel,
    *,
    tokenizer: Path,
    folder: Path,
    device: str,
    penalty: Callable[[], Tensor] | None = None,
    progress: Progress | None = None,
    notice: Notice = lambda _text: None,
) -> dict[str, Any]:
    """Train a live float32 model in place; returns the record. The model is in eval mode afterwards.

    Args:
        spec: How to train; its data is a jsonl file.
        model: Only parameters with `requires_grad` change.
        tokenizer: Directory.
        folder: What file names in the spec start at.
        penalty: Added to the loss of every step.
    """
    words = load_tokenizer(tokenizer)
    given = read_given(spec, words, folder / str(spec.data), folder)
    started, cache = time.monotonic(), model.config.use_cache
    with quiet(), reproducible(spec.seed):
        rows, _ = scheduled(spec, model, words, given)
        held = HeldOut(given.held_out, spec.batch_size, spec.evaluate_every, spec.patience) if given.held_out else None
        losses = fit(spec, model, rows, device, Watch(held, penalty, progress=progress, notice=notice))
    model.eval()
    model.config.use_cache = cache
    return {
        "data_digest": given.texts.digests,
        "rows": len(given.skill),
        "steps": len(losses),
        "tokens": sum(len(ids) for ids, _ in rows),
        "loss": final_loss(losses),
        **({"held_out_loss": held.record(len(given.held_out))} if held else {}),
        "seconds": round(time.monotonic() - started, 1),
        "threads": THREADS,
        "versions": installed(*LIBRARIES),
    }

"""Further training of the parameters of a live model that have `requires_grad` set."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.identity import installed
from workbench.models.prompts import load_tokenizer
from workbench.train.fit import SILENT, Reports, Watch, fit
from workbench.train.heldout import HeldOut
from workbench.train.inputs import read_inputs, scheduled
from workbench.train.objective import CROSS_ENTROPY, Objective
from workbench.train.run import LIBRARIES, final_loss
from workbench.train.spec import TrainSpec
from workbench.train.surroundings import THREADS, quiet, reproducible

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def train_parameters(
    spec: TrainSpec,
    model: PreTrainedModel,
    *,
    tokenizer: Path,
    folder: Path,
    penalty: Callable[[], Tensor] | None = None,
    told: Reports = SILENT,
    objective: Objective = CROSS_ENTROPY,
) -> dict[str, Any]:
    """Train a live float32 model in place, leave it in eval mode, and return the training record.

    Args:
        spec: Settings of the training; its data is a jsonl file.
        model: The model. Only parameters with `requires_grad` change.
        tokenizer: Directory of the tokenizer.
        folder: Directory that file names in the spec start from.
        penalty: Function whose value is added to the loss of every step.
        told: Who hears of it.
        objective: What the training minimizes. Held-out losses are cross-entropies in any case.
    """
    words = load_tokenizer(tokenizer)
    inputs = read_inputs(spec, words, folder / str(spec.data), folder)
    started, cache = time.monotonic(), model.config.use_cache
    with quiet(), reproducible(spec.seed):
        rows, _ = scheduled(spec, model, words, inputs)
        held_out = HeldOut(inputs.held_out, spec.batch_size, spec.evaluate_every, spec.patience) if inputs.held_out else None
        losses = fit(spec, model, rows, str(model.device), Watch(held_out, penalty, told=told, objective=objective))
    model.eval()
    model.config.use_cache = cache
    return {
        "data_digest": inputs.texts.digests,
        "rows": len(inputs.skill),
        "steps": len(losses),
        "tokens": sum(len(ids) for ids, _ in rows),
        "loss": final_loss(losses),
        **({"held_out_loss": held_out.record(len(inputs.held_out))} if held_out else {}),
        "seconds": round(time.monotonic() - started, 1),
        "threads": THREADS,
        "versions": installed(*LIBRARIES),
    }

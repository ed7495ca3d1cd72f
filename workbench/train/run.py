"""Training of a brick: a LoRA adapter or a full fine-tune, on prompts and completions or whole texts.

The loss covers only the tokens of the completion. Rows are padded on the right, and the vocabulary projection runs only at
positions that predict a token of a completion. PEFT and transformers' Trainer do the rest.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.files import json_digest, scratch_beside, write_text
from workbench.ground.identity import installed
from workbench.models.identity import loaded_tokens_digest
from workbench.models.prompts import load_tokenizer
from workbench.steps import TrainMethod
from workbench.train.fit import SILENT, HeldOut, Reports, Watch, fit, model_digest, open_saves
from workbench.train.penalties import Orthogonal
from workbench.train.rows import CROSS_ENTROPY, Objective, refuse_mixing
from workbench.train.spec import TrainSpec
from workbench.train.texts import Inputs, read_inputs, scheduled, state_restored
from workbench.weights.header import disk_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DECLARED_BASE = "bricks/starter/base"
LIBRARIES = ("torch", "transformers", "peft")
THREADS = 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, advice and deprecation warnings of transformers, but not errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed all random generators and use deterministic kernels on one thread; restore everything afterwards.

    One thread makes the result independent of the number of cores, because sums over several threads round differently.
    """
    import random

    import numpy as np
    import torch
    from transformers import set_seed

    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    set_seed(seed)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.set_rng_state(torch_state)
        torch.cuda.set_rng_state_all(on_devices)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@dataclass(frozen=True)
class TrainFiles:
    """What a training reads, and where it writes the brick.

    Attributes:
        base: Directory of the base with its tokenizer.
        data: The jsonl file of training rows (`spec.data` resolved by the caller), or a directory if `spec.data` is a data set.
        out: Directory for the adapter in bfloat16, or for the checkpoint with its tokenizer. During the training,
            `out/.training` holds the saves to resume from.
        folder: Directory that other file names in the spec start from; None uses `data`, or the directory that contains it.
        others: Directories of the bricks in `spec.orthogonal_to` by name; None looks for them in the folder.
        declared: Name of the base in adapter_config.json.
    """

    base: Path
    data: Path
    out: Path
    folder: Path | None = None
    others: Mapping[str, Path] | None = None
    declared: str = DECLARED_BASE

    @property
    def start(self) -> Path:
        """Directory that file names in the spec start from."""
        return self.folder or (self.data if self.data.is_dir() else self.data.parent)

    def orthogonal_to(self, spec: TrainSpec) -> Mapping[str, Path]:
        """Return the directories of the bricks in `spec.orthogonal_to` by name."""
        return self.others if self.others is not None else {name: self.start / name for name in spec.orthogonal_to}


def train(
    spec: TrainSpec,
    files: TrainFiles,
    *,
    device: str = "cpu",
    model: PreTrainedModel | None = None,
    callbacks: Reports = SILENT,
    objective: Objective = CROSS_ENTROPY,
) -> dict[str, object]:
    """Train one brick, write it, and return the training record.

    The same spec and data on the same kind of processor give the same bytes, even after an interruption. The record contains
    no path of this machine.

    Args:
        spec: Settings of the training.
        files: What it reads, and where it writes.
        device: "cpu" or a cuda device.
        model: Live model to train instead of the base, which then provides only the tokenizer. LoRA leaves the model
            unchanged; `full` trains it in float32 and leaves it in bfloat16.
        callbacks: Receive progress and notices.
        objective: What the training minimizes.

    Raises:
        WorkbenchError: If the data or the other bricks are missing or invalid.
    """
    import torch

    tokenizer = load_tokenizer(files.base)
    inputs = read_inputs(spec, tokenizer, files.data, files.start)
    spec = spec.with_steps(len(inputs.skill))
    paths = files.orthogonal_to(spec)
    started = time.monotonic()
    with quiet(), reproducible(spec.seed), state_restored(model):
        live = _load(spec, files.base, model).to(device)
        parent = [model_digest(live), loaded_tokens_digest(tokenizer)] if 0 < spec.save_every < spec.steps else None
        rows, replayed = scheduled(spec, live, tokenizer, inputs)
        with _adapted(spec, live, lent=model is not None) as trained:
            if spec.packing:
                refuse_mixing(trained, rows[0])
            orthogonal = Orthogonal(paths, trained, torch.device(device)) if paths else None
            before = orthogonal.overlap() if orthogonal else {}
            others_digest = orthogonal.digest() if orthogonal else None
            data_key = [inputs.texts.digests, rows[len(rows) - replayed :], others_digest]
            data_key += [objective.digest] if objective.digest else []
            data_key += [inputs.skill] if any(text.messages for text in inputs.texts.trained) else []  # the template may change
            key = json_digest([TrainMethod.version, spec.record(), parent, *data_key, device, installed(*LIBRARIES)])
            held_out = _held_out(spec, inputs)
            saves = open_saves(files.out, key if parent else None, callbacks.notice)
            penalty = (lambda: spec.orthogonal * orthogonal.penalty()) if orthogonal else None
            callbacks.notice(f"{spec.steps} steps of {spec.batch_size * spec.gradient_accumulation_steps} rows on {device}")
            losses = fit(spec, trained, rows, device, Watch(held_out, penalty, saves, callbacks, objective))
            measured = _measured(held_out, len(inputs.held_out), len(losses), before, orthogonal)
            files.out.mkdir(parents=True, exist_ok=True)
            _save(spec, trained, tokenizer, files)
        saves.remove()
    return {
        **spec.record(),
        "data_digest": inputs.texts.digests,
        "rows": len(inputs.skill),
        "replayed": replayed * (spec.epochs or 1),
        "tokens": sum(len(ids) for ids, _ in rows) * (spec.epochs or 1),
        "learned_tokens": sum(learned for _, learned in rows) * (spec.epochs or 1),
        "loss": final_loss(losses),
        **measured,
        **objective.record,
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.device(device).type,
        "threads": THREADS,
        "versions": installed(*LIBRARIES),
    }


def final_loss(losses: list[float]) -> float:
    """Return the mean loss of the last tenth of the steps."""
    tail = losses[-max(1, len(losses) // 10) :]
    return round(math.fsum(tail) / len(tail), 4)


def _held_out(spec: TrainSpec, inputs: Inputs) -> HeldOut | None:
    """Return the held-out rows, if there are any."""
    if not inputs.held_out:
        return None
    return HeldOut(inputs.held_out, spec.batch_size, spec.evaluate_every, spec.patience, spec.dtype == "bfloat16")


def _measured(
    held_out: HeldOut | None, count: int, steps: int, before: Mapping[str, float], orthogonal: Orthogonal | None
) -> dict[str, object]:
    """Return the part of the record on held-out rows and other bricks."""
    record: dict[str, object] = {"held_out_loss": held_out.record(count), "steps_taken": steps} if held_out else {}
    if orthogonal:
        after = orthogonal.overlap()
        record["overlap"] = {name: {"before": round(before[name], 4), "after": round(after[name], 4)} for name in after}
    return record


def _load(spec: TrainSpec, base: Path, model: PreTrainedModel | None) -> PreTrainedModel:
    """Load the base, or prepare the caller's model."""
    from transformers import AutoModelForCausalLM

    if model is not None:
        if spec.method == "full":
            _cast(model, spec.weights_dtype)
            model.requires_grad_(True)
        return model
    # On rows of a few dozen tokens, the backward pass of fused attention is slower than that of eager attention.
    return AutoModelForCausalLM.from_pretrained(
        str(base), dtype=spec.weights_dtype, attn_implementation="eager", local_files_only=True
    )


@contextlib.contextmanager
def _adapted(spec: TrainSpec, model: PreTrainedModel, *, lent: bool) -> Iterator[PreTrainedModel]:
    """Yield the model with new adapters in float32 (LoRA) or as it is (full), removing the adapters from a caller's model."""
    if spec.method == "full":
        yield model
        return
    from peft import LoraConfig, get_peft_model

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    try:
        yield adapted
    finally:
        if lent:
            adapted.unload()


def _save(spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: TrainFiles) -> None:
    """Write the brick in bfloat16, without the empty model card that PEFT adds."""
    import torch

    out = files.out
    if spec.method == "full":
        _cast(model, torch.bfloat16)
        with disk_errors(out):
            model.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))
        return
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    config: Any = model.peft_config["default"]
    # A path of this machine would be meaningless elsewhere.
    config.base_model_name_or_path = files.declared
    config.inference_mode = True
    with scratch_beside(out / "adapter_model.safetensors") as folder, disk_errors(out):
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        # PEFT keeps target modules in a set, whose order varies.
        settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        if isinstance(settings.get("target_modules"), list):
            settings["target_modules"] = sorted(settings["target_modules"])
        write_text(folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for file in folder.iterdir():
            file.replace(out / file.name)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the stored tensors but not buffers such as rotary frequencies, whose rounding would change the caller's model."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def train_parameters(
    spec: TrainSpec,
    model: PreTrainedModel,
    *,
    tokenizer: Path,
    folder: Path,
    penalty: Callable[[], Tensor] | None = None,
    callbacks: Reports = SILENT,
    objective: Objective = CROSS_ENTROPY,
) -> dict[str, object]:
    """Train a live float32 model in place, leave it in eval mode, and return the training record.

    Args:
        spec: Settings of the training; its data is a jsonl file.
        model: The model. Only parameters with `requires_grad` change.
        tokenizer: Directory of the tokenizer.
        folder: Directory that file names in the spec start from.
        penalty: Function whose value is added to the loss of every step.
        callbacks: Receive progress and notices.
        objective: What the training minimizes. Held-out losses are cross-entropies in any case.
    """
    words = load_tokenizer(tokenizer)
    inputs = read_inputs(spec, words, folder / str(spec.data), folder)
    started, cache = time.monotonic(), model.config.use_cache
    with quiet(), reproducible(spec.seed):
        rows, _ = scheduled(spec, model, words, inputs)
        held_out = _held_out(spec, inputs)
        losses = fit(spec, model, rows, str(model.device), Watch(held_out, penalty, callbacks=callbacks, objective=objective))
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

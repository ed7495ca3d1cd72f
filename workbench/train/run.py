"""Train a brick: a LoRA adapter, or a full fine-tune, on prompts and completions or whole texts.

The loss is taken on the completion alone. Rows are padded on the right, and the vocabulary projection runs only at positions that
predict a token of a completion (it is half of a small model's training time otherwise). PEFT and transformers' Trainer do the rest.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import json_digest, write_text
from workbench.models.tokenizer import load_tokenizer
from workbench.steps import TrainMethod
from workbench.train.fit import Notice, Progress, Watch, fit
from workbench.train.given import lent, read_given, scheduled
from workbench.train.heldout import HeldOut
from workbench.train.orthogonal import Orthogonal
from workbench.train.resume import model_digest, open_saves
from workbench.train.spec import TrainSpec
from workbench.train.surroundings import THREADS, quiet, reproducible
from workbench.versions import installed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DECLARED_BASE = "bricks/starter/base"
LIBRARIES = ("torch", "transformers", "peft")


def train(
    spec: TrainSpec,
    *,
    base: Path,
    data: Path,
    out: Path,
    device: str = "cpu",
    progress: Progress | None = None,
    notice: Notice = lambda _text: None,
    folder: Path | None = None,
    others: Mapping[str, Path] | None = None,
    model: PreTrainedModel | None = None,
    declared: str = DECLARED_BASE,
) -> dict[str, Any]:
    """Train one brick and write it to `out`; returns the training record.

    Args:
        spec: How to train.
        base: A model directory with its tokenizer; loaded in bfloat16 under LoRA, in float32 under `full`.
        data: The jsonl file of training rows (`spec.data` resolved by the caller), or a folder where `spec.data` is a data set.
        out: Takes adapter_config.json and adapter_model.safetensors in bfloat16, or a checkpoint with tokenizer. Until then
            `out/.training` holds what an interrupted training goes on from.
        device: `cpu` or a cuda device.
        progress: Called after each step.
        notice: Called with lines for the user: where training goes on, why it stopped.
        folder: What other names in the spec start at; where it is not given, the folder that `data` is or lies in.
        others: Directories of the bricks in `spec.orthogonal_to`, by name; below `folder` where they are not given.
        model: A live model that is trained in the place of the base, which then gives the tokenizer only. Under LoRA it keeps its dtype
            and is given back as it was; under `full` it is trained itself, in float32, and given back in bfloat16.
        declared: The base's name in adapter_config.json.

    The record holds no path of this machine. Same spec, data and kind of processor: the same bytes, interrupted or not.
    """
    import torch

    folder = folder or (data if data.is_dir() else data.parent)
    tokenizer = load_tokenizer(base)
    given = read_given(spec, tokenizer, data, folder)
    paths = others if others is not None else {name: folder / name for name in spec.orthogonal_to}
    started = time.monotonic()
    with quiet(), reproducible(spec.seed), lent(model):
        live = _load(spec, base, model).to(device)
        parent = model_digest(live) if 0 < spec.save_every < spec.steps else None
        rows, replayed = scheduled(spec, live, tokenizer, given)
        with _adapted(spec, live, lent=model is not None) as trained:
            orthogonal = Orthogonal(paths, trained, torch.device(device)) if paths else None
            before = orthogonal.overlap() if orthogonal else {}
            key = json_digest([TrainMethod.version, spec.record(), parent, given.texts.digests, rows[len(rows) - replayed :],
                               orthogonal.digest() if orthogonal else None, device, installed(*LIBRARIES)])  # fmt: skip
            held = HeldOut(given.held_out, spec.batch_size, spec.evaluate_every, spec.patience) if given.held_out else None
            saves = open_saves(out, key if parent else None, notice)
            penalty = (lambda: spec.orthogonal * orthogonal.penalty()) if orthogonal else None
            losses = fit(spec, trained, rows, device, Watch(held, penalty, saves, progress, notice))
            measured = _measured(held, len(given.held_out), len(losses), before, orthogonal)
            out.mkdir(parents=True, exist_ok=True)
            _save(spec, trained, tokenizer, out, declared)
        saves.remove()
    return {
        **spec.record(),
        "data_digest": given.texts.digests,
        "rows": len(given.skill),
        "replayed": replayed,
        "tokens": sum(len(ids) for ids, _ in rows),
        "learned_tokens": sum(learned for _, learned in rows),
        "loss": final_loss(losses),
        **measured,
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.device(device).type,
        "threads": THREADS,
        "versions": installed(*LIBRARIES),
    }


def final_loss(losses: list[float]) -> float:
    """Mean of the last tenth of the steps."""
    tail = losses[-max(1, len(losses) // 10) :]
    return round(math.fsum(tail) / len(tail), 4)


def _measured(
    held: HeldOut | None, count: int, steps: int, before: Mapping[str, float], orthogonal: Orthogonal | None
) -> dict[str, Any]:
    """What the record says of held-out rows and other bricks."""
    found: dict[str, Any] = {"held_out_loss": held.record(count), "steps_taken": steps} if held else {}
    if orthogonal:
        after = orthogonal.overlap()
        found["overlap"] = {name: {"before": round(before[name], 4), "after": round(after[name], 4)} for name in after}
    return found


def _load(spec: TrainSpec, base: Path, model: PreTrainedModel | None) -> PreTrainedModel:
    """The base, in bfloat16 under LoRA and in float32 when all of it is trained; or the model that was lent."""
    import torch
    from transformers import AutoModelForCausalLM

    if model is not None:
        if spec.method == "full":
            _cast(model, torch.float32)
            model.requires_grad_(True)
        return model
    # Fused attention's backward costs more than the plain one on rows of a few dozen tokens.
    return AutoModelForCausalLM.from_pretrained(
        str(base),
        dtype=torch.bfloat16 if spec.method == "lora" else torch.float32,
        attn_implementation="eager",
        local_files_only=True,
    )


@contextlib.contextmanager
def _adapted(spec: TrainSpec, model: PreTrainedModel, *, lent: bool) -> Iterator[PreTrainedModel]:
    """The model with fresh adapters in float32, or as it is; a lent model is rid of them afterwards."""
    if spec.method == "full":
        yield model
        return
    from peft import LoraConfig, get_peft_model

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    try:
        yield adapted
    finally:
        if lent:
            adapted.unload()


def _save(spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, declared: str) -> None:
    """Write the brick in bfloat16, without the empty model card that PEFT adds."""
    import torch

    if spec.method == "full":
        _cast(model, torch.bfloat16)
        model.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))
        return
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    config: Any = model.peft_config["default"]
    # The card names the base; a path of this machine would mean nothing elsewhere.
    config.base_model_name_or_path = declared
    config.inference_mode = True
    readme = out / "README.md"
    kept = readme.read_bytes() if readme.is_file() else None
    model.save_pretrained(str(out), save_embedding_layers=False)
    readme.unlink(missing_ok=True)
    if kept is not None:
        readme.write_bytes(kept)
    _sort_config(out / "adapter_config.json")


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is stored. Frequencies of rotary embeddings are not: a model that lives on would compute other positions."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _sort_config(path: Path) -> None:
    """Rewrite the adapter's config with sorted target modules: PEFT keeps them in a set, whose order varies."""
    config = json.loads(path.read_text("utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")

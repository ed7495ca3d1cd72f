"""Train a brick: a LoRA adapter, or a full fine-tune, on a jsonl file of prompts and completions.

The loss is taken on the completion alone. Rows are padded on the left, so that all completions end at the
last position and the vocabulary projection runs on the last few positions only (it is half of a small
model's training time otherwise). PEFT and transformers' Trainer do the rest.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.train.fit import Progress, fit
from workbench.train.rows import encode, read_rows, replay
from workbench.train.spec import TrainSpec
from workbench.train.surroundings import THREADS, quiet, reproducible
from workbench.versions import installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DECLARED_BASE = "bricks/starter/base"


def train(
    spec: TrainSpec,
    *,
    base: Path,
    data: Path,
    out: Path,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one brick and write it to `out`; returns the training record.

    Args:
        spec: How to train.
        base: A model directory with its tokenizer; loaded in bfloat16 under LoRA, in float32 under `full`.
        data: The jsonl file of training rows (`spec.data` resolved by the caller).
        out: Takes adapter_config.json and adapter_model.safetensors in bfloat16, or a checkpoint with tokenizer.
        device: `cpu` or a cuda device.
        progress: Called with (step, steps, loss) after each step.

    The record holds no path. Same spec, data and kind of processor: the same bytes.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    skill = [
        encode(tokenizer, prompt, completion, spec.max_length, spec.learn_end)
        for prompt, completion in read_rows(data, "prompt", "completion")
    ]
    prompts = read_rows(data.parent / spec.replay, "prompt") if spec.replay else []
    started = time.monotonic()
    with quiet(), reproducible(spec.seed):
        model = _load(spec, base).to(device)
        total = spec.steps * spec.batch_size
        replayed = replay(spec, model, tokenizer, prompts, round(total * spec.replay_share)) if prompts else []
        rows = [skill[index % len(skill)] for index in range(total - len(replayed))] + replayed
        model = _adapted(spec, model)
        losses = fit(spec, model, rows, tokenizer.eos_token_id, device, progress)
        out.mkdir(parents=True, exist_ok=True)
        _save(spec, model, tokenizer, out)
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        **spec.model_dump(mode="json"),
        "rows": len(skill),
        "replayed": len(replayed),
        "tokens": sum(len(ids) for ids, _ in rows),
        "learned_tokens": sum(learned for _, learned in rows),
        "loss": round(math.fsum(tail) / len(tail), 4),
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.device(device).type,
        "threads": THREADS,
        "versions": installed("torch", "transformers", "peft"),
    }


def _load(spec: TrainSpec, base: Path) -> PreTrainedModel:
    """The base, in bfloat16 under LoRA and in float32 when all of it is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    # Fused attention's backward costs more than the plain one on rows of a few dozen tokens.
    return AutoModelForCausalLM.from_pretrained(
        str(base),
        dtype=torch.bfloat16 if spec.method == "lora" else torch.float32,
        attn_implementation="eager",
        local_files_only=True,
    )


def _adapted(spec: TrainSpec, model: PreTrainedModel) -> PreTrainedModel:
    """The model with fresh adapters in float32, or as it is."""
    if spec.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _save(spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the brick in bfloat16, without the empty model card that PEFT adds."""
    import torch

    if spec.method == "full":
        model.to(torch.bfloat16).save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))
        return
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    config: Any = model.peft_config["default"]
    # The card names the base; a path of this machine would mean nothing elsewhere.
    config.base_model_name_or_path = DECLARED_BASE
    config.inference_mode = True
    readme = out / "README.md"
    kept = readme.read_bytes() if readme.is_file() else None
    model.save_pretrained(str(out), save_embedding_layers=False)
    readme.unlink(missing_ok=True)
    if kept is not None:
        readme.write_bytes(kept)
    _sort_config(out / "adapter_config.json")


def _sort_config(path: Path) -> None:
    """Rewrite the adapter's config with sorted target modules: PEFT keeps them in a set, whose order varies."""
    config = json.loads(path.read_text("utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")

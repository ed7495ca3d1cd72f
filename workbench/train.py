"""Train a brick: a LoRA adapter, or a full fine-tune, on a jsonl file of prompts and completions.

The loss is taken on the completion alone. Rows are padded on the left, so that all completions end at the
last position and the vocabulary projection runs on the last few positions only (it is half of a small
model's training time otherwise). PEFT and transformers' Trainer do the rest.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from workbench.errors import WorkbenchError
from workbench.versions import installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int, float], None]
IGNORED = -100
THREADS = 1
DECLARED_BASE = "bricks/starter/base"


class TrainSpec(BaseModel):
    """What `train.yaml` holds: how one brick is trained. Two equal specs on equal data give equal bricks."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str = "train.jsonl"
    """Training rows, {"prompt", "completion"} a line; relative to the folder of train.yaml."""
    method: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter, `full` every weight."""
    replay: str | None = None
    """Prompts, {"prompt"} a line, that the brick learns to continue as the base does; what follows each is sampled
    from the base before training. Keeps the brick quiet off its skill, and so easier to merge."""
    replay_share: float = Field(0.3, gt=0, lt=1)
    """Part of the rows that are replayed, when `replay` is given."""
    replay_tokens: int = Field(6, ge=1)
    """Tokens sampled after each replayed prompt."""
    rank: int = Field(8, ge=1)
    """Rank of the adapter (LoRA)."""
    alpha: int = Field(16, ge=1)
    """The adapter's update is scaled by alpha / rank (LoRA)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: all linear layers but the output head, or name endings (LoRA)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapter (LoRA)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    steps: int = Field(150, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(16, ge=1)
    """Rows a step."""
    max_length: int = Field(128, ge=8)
    """Most tokens a row may have; a longer row is an error, never cut."""
    warmup: int = Field(10, ge=0)
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    learn_end: bool = True
    """Whether the end of the sequence is learned after each completion. Bricks that answer in a fixed number of
    tokens may leave it out: what they learn about stopping cuts the answers of others short in a merge."""
    seed: int = Field(0, ge=0)
    """Seed of adapter initialisation, row order and dropout."""


def read_rows(path: Path, *keys: str) -> list[tuple[str, ...]]:
    """The texts under `keys` for each line of a jsonl file. Errors name the line."""
    if not path.is_file():
        raise WorkbenchError(f"{path.name}: no such file of training rows", "Check the file names in train.yaml.")
    rows: list[tuple[str, ...]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(tuple(str(row[key]) for key in keys))
        except (json.JSONDecodeError, KeyError, TypeError):
            wanted = " and ".join(f"`{key}`" for key in keys)
            raise WorkbenchError(f"{path.name}:{number}: expected an object with {wanted}") from None
    if not rows:
        raise WorkbenchError(f"{path.name}: holds no training rows")
    return rows


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int, learn_end: bool = True
) -> tuple[list[int], int]:
    """Token ids of prompt, one blank, completion and (with learn_end) end of sequence; how many are learned.

    The prompt is tokenised by itself, as it will be when the model is asked. Errors: longer than max_length.
    """
    head: list[int] = tokenizer(prompt)["input_ids"]
    tail: list[int] = tokenizer(" " + completion, add_special_tokens=False)["input_ids"]
    if learn_end:
        tail = [*tail, tokenizer.eos_token_id]
    if len(head) + len(tail) > max_length:
        raise WorkbenchError(
            f"a training row has {len(head) + len(tail)} tokens, more than max_length {max_length}: {prompt[:60]!r}",
            "Raise max_length in train.yaml, or shorten the row.",
        )
    return head + tail, len(tail)


def collate(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, Any]:
    """A batch padded on the left, with labels for the last `logits_to_keep` positions only.

    Shapes: input_ids and attention_mask (rows, longest); labels (rows, longest completion + 1), IGNORED
    outside the completion. The extra position is the one that predicts the first token of the completion.
    """
    import torch

    width = max(len(ids) for ids, _ in rows)
    keep = max(learned for _, learned in rows) + 1
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    # As indices, not as a count: a slice is not contiguous, and the projection would copy its matrix for each row.
    positions = torch.arange(width - keep, width)
    labels = torch.full((len(rows), keep), IGNORED)
    for row, (tokens, learned) in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
        labels[row, keep - learned :] = torch.tensor(tokens[len(tokens) - learned :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": positions}


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
    with _quiet(), _reproducible(spec.seed):
        model = _load(spec, base).to(device)
        total = spec.steps * spec.batch_size
        replayed = _replay(spec, model, tokenizer, prompts, round(total * spec.replay_share)) if prompts else []
        rows = [skill[index % len(skill)] for index in range(total - len(replayed))] + replayed
        model = _adapted(spec, model)
        losses = _fit(spec, model, rows, tokenizer.eos_token_id, device, progress)
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


def _replay(
    spec: TrainSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[tuple[str, ...]],
    count: int,
) -> list[tuple[list[int], int]]:
    """`count` rows: prompts with what the model, untrained so far, samples after them.

    Sampled at temperature 1, not greedily: the expected gradient on a model's own samples is zero, while its
    greedy text would teach it to be surer than it was. The end of the sequence is not sampled: all rows go on.
    """
    import torch

    heads: list[list[int]] = [tokenizer(prompts[index % len(prompts)][0])["input_ids"] for index in range(count)]
    rows: list[tuple[list[int], int]] = []
    model.eval()
    # generate() hands the head a slice; see collate.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    for start in range(0, count, 64):
        batch = heads[start : start + 64]
        inputs = collate([(ids, 0) for ids in batch], tokenizer.eos_token_id)
        with torch.no_grad():
            sampled = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                do_sample=True,
                top_k=0,
                min_new_tokens=spec.replay_tokens,
                max_new_tokens=spec.replay_tokens,
            )
        tails = sampled[:, inputs["input_ids"].shape[1] :].tolist()
        rows += [(ids + tail, len(tail)) for ids, tail in zip(batch, tails, strict=True)]
    hook.remove()
    return rows


def _fit(
    spec: TrainSpec,
    model: PreTrainedModel,
    rows: list[tuple[list[int], int]],
    pad: int,
    device: str,
    progress: Progress | None,
) -> list[float]:
    """Run the optimizer; returns the loss of each step."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    losses: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            weight_decay=spec.weight_decay,
            warmup_steps=spec.warmup,
            lr_scheduler_type="constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
            bf16=True,
            use_cpu=device == "cpu",
            seed=spec.seed,
            data_seed=spec.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=lambda batch: collate(batch, pad))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_recorder(losses, spec.steps, progress))
        trainer.train()
    return losses


def _recorder(losses: list[float], steps: int, progress: Progress | None) -> Any:
    """A Trainer callback that keeps each step's loss and reports it."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]  # untyped library
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))
                if progress:
                    progress(state.global_step, steps, losses[-1])

    return Recorder()


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars, advice and deprecation notes of transformers off the terminal; errors pass."""
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
def _reproducible(seed: int) -> Iterator[None]:
    """Seed every generator and ask torch for deterministic kernels, on one thread; all of it is put back afterwards.

    One thread, because sums over several end in other bits: the same brick on every number of cores.
    """
    import random

    import numpy as np
    import torch
    from transformers import set_seed

    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    state, legacy, plain = torch.get_rng_state(), np.random.get_state(), random.getstate()
    set_seed(seed)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
        torch.set_rng_state(state)
        np.random.set_state(legacy)
        random.setstate(plain)

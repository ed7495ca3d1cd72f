"""The optimization by transformers' Trainer on tokenized rows: saves to resume from, held-out losses, early stopping."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground import jsondoc
from workbench.ground.events import Events
from workbench.ground.files import json_digest, read_json, write_json
from workbench.ground.lazy import torch
from workbench.ground.manifest import has_its_files, seal
from workbench.train.rows import CROSS_ENTROPY, Objective, batch_loss, collate, packed
from workbench.train.spec import TrainSpec
from workbench.weights.device import indexed
from workbench.weights.digests import meaning_of, tensor_digest
from workbench.weights.header import disk_errors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


FOLDER = ".training"
_KEY = "key.json"


@dataclass(frozen=True)
class Saves:
    """Saves of a training.

    Attributes:
        folder: Directory of the saves, or None if the training makes none.
        last: Save to resume from, or None.
    """

    folder: Path | None = None
    last: Path | None = None

    def remove(self) -> None:
        """Delete the saves, after the brick is written."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_saves(out: Path, key: str | None, notice: Callable[[str], None]) -> Saves:
    """Open the saves in a brick's directory, deleting those of other settings and incomplete ones.

    Args:
        out: The brick's directory.
        key: Digest of everything that determines the result. Saves with another key are deleted. None disables saves.
        notice: Callback for a message about deleted saves, or about the step that training resumes from.
    """
    folder = out / FOLDER
    if folder.is_dir() and (key is None or read_json(folder / _KEY) != {"key": key}):
        notice("the saves of an interrupted training are discarded: settings, data, base or libraries have changed")
        shutil.rmtree(folder)
    if key is None:
        return Saves()
    saves = {int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()}
    for step in [step for step, path in saves.items() if not has_its_files(path)]:
        shutil.rmtree(saves.pop(step))
    write_json(folder / _KEY, {"key": key})
    if not saves:
        return Saves(folder)
    last = max(saves)
    notice(f"resuming an interrupted training after step {last}")
    return Saves(folder, saves[last])


def model_digest(model: Any) -> str:
    """Return a digest of a live model: its class, its configuration and its tensors."""
    tensors = [[name, tensor_digest(tensor)] for name, tensor in model.state_dict().items()]
    return json_digest([type(model).__name__, meaning_of(model.config.to_dict()), tensors])


_LOSSES, _BEST = "held_out.json", "held_out.safetensors"


class HeldOut:
    """Held-out rows and the losses measured on them.

    Args:
        rows: Token ids and the number of learned tokens, as `encode` returns them.
        batch_size: Number of rows per forward pass.
        every: Number of steps between two measurements.
        patience: Number of measurements without a lower loss after which training stops. None disables early stopping and
            does not keep the best weights.
        mixed: Whether to compute in bfloat16, as the training does.
    """

    def __init__(
        self, rows: list[tuple[list[int], int]], batch_size: int, every: int, patience: int | None, mixed: bool = True
    ) -> None:
        self.batches = [collate(part) for part in _similar(rows, batch_size)]
        self.mixed = mixed
        self.every = every
        self.patience = patience
        self.losses: list[tuple[int, float]] = []
        """Pairs (step, loss); the first one is measured before training."""
        self._best: dict[str, Tensor] = {}

    def measure(self, model: Any, step: int) -> float:
        """Measure and record the mean loss per learned token; with patience, keep the weights if it is the lowest so far.

        The measurement draws no random numbers, so it does not change the training.
        """
        loss = held_out_loss(model, self.batches, self.mixed)
        self.losses.append((step, loss))
        if self.patience is not None and self.best_step == step:
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
        return loss

    @property
    def best_step(self) -> int:
        """The step with the lowest loss, the first one if several are equal. The state before training does not count."""
        trained = self.losses[1:]
        return min(trained, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])[0] if trained else 0

    @property
    def exhausted(self) -> bool:
        """True if the last `patience` measurements brought no lower loss."""
        if self.patience is None:
            return False
        later = [step for step, _ in self.losses if step > self.best_step]
        return len(later) >= self.patience

    def restore(self, model: Any) -> None:
        """Restore the weights with the lowest loss, if they were kept."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self._best:
                    parameter.copy_(self._best[name])

    def save(self, folder: Path) -> None:
        """Write losses and best weights into a save of the training."""
        write_json(folder / _LOSSES, self.losses)
        if self._best:
            save_tensors(self._best, folder / _BEST)

    def load(self, folder: Path) -> None:
        """Read losses and best weights that `save` wrote."""
        from safetensors.torch import load_file

        self.losses = [(int(step), float(loss)) for step, loss in jsondoc.read_cached(folder / _LOSSES, list) or []]
        self._best = load_file(folder / _BEST) if (folder / _BEST).is_file() else {}

    def record(self, count: int) -> dict[str, object]:
        """Return the record for the card: losses before training, of the final weights, and at the best step."""
        losses = dict(self.losses)
        best, last = self.best_step, self.losses[-1][0]
        final = last if self.patience is None else best
        return {
            "rows": count,
            "before": round(losses[0], 4),
            "after": round(losses[final], 4),
            "best": round(losses[best], 4),
            "best_step": best,
        }


def _similar(rows: list[tuple[list[int], int]], batch_size: int) -> list[list[tuple[list[int], int]]]:
    """Return rows in batches of similar length, which need less padding. The sort is stable, so the batches are always the same."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def held_out_loss(model: Any, batches: list[dict[str, Tensor]], mixed: bool = True) -> float:
    """Return the mean −log p of the learned tokens of all batches, without dropout; `mixed` computes in bfloat16."""
    device = next(model.parameters()).device
    training, total, count = model.training, 0.0, 0
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
        for batch in batches:
            learned = len(batch["targets"])
            total += float(batch_loss(model, {name: value.to(device) for name, value in batch.items()})) * learned
            count += learned
    model.train(training)
    return total / count


Progress = Callable[[int, int, float, float | None], None]
"""Callback that receives the step, the number of steps, the step's loss, and the last held-out loss or None."""
Notice = Callable[[str], None]
"""Callback that receives a line for the user."""


@dataclass(frozen=True)
class Reports:
    """Callbacks of a training.

    Attributes:
        progress: Callback after each step.
        notice: Callback for other messages to the user.
    """

    progress: Progress = lambda *_: None
    notice: Notice = lambda _text: None


SILENT = Reports()


def reports(events: Events, step: str) -> Reports:
    """Return callbacks that turn progress and notices into events of the stage "train".

    Args:
        events: Receiver of the events.
        step: Name of the step or brick in the events.
    """

    def progress(done: int, total: int, loss: float, held_out: float | None) -> None:
        text = f"loss {loss:.3f}" + ("" if held_out is None else f", held out {held_out:.3f}")
        events({"stage": "train", "step": step, "done": done, "total": total, "text": text})

    return Reports(progress, lambda text: events({"stage": "train", "step": step, "text": text}))


@dataclass(frozen=True)
class Watch:
    """Hooks into a training.

    Attributes:
        held_out: Held-out rows.
        penalty: Function whose value is added to the loss of every step.
        saves: Directory for saves, and the save to resume from.
        callbacks: Receive progress and notices.
        objective: What the training minimizes.
    """

    held_out: HeldOut | None = None
    penalty: Callable[[], Tensor] | None = None
    saves: Saves = field(default_factory=Saves)
    callbacks: Reports = SILENT
    objective: Objective = CROSS_ENTROPY


def fit(spec: TrainSpec, model: PreTrainedModel, rows: list[tuple[list[int], int]], device: str, watch: Watch) -> list[float]:
    """Run the optimizer and return the loss of each step, without the penalty.

    Args:
        spec: Settings of the training.
        model: The live model, trained in place.
        rows: Token ids and the number of learned tokens, as `encode` returns them, of one pass over the data.
        device: "cpu" or a cuda device.
        watch: Hooks into the training.
    """
    place = torch.device(device)
    with tempfile.TemporaryDirectory() as scratch, torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        arguments = _arguments(spec, watch.saves.folder or Path(scratch), device, bool(watch.saves.folder))
        trainer = _trainer(spec, arguments, model, rows, watch)
        if watch.held_out and watch.saves.last:
            watch.held_out.load(watch.saves.last)
        try:
            trainer.train(resume_from_checkpoint=str(watch.saves.last) if watch.saves.last else None)
        finally:
            # The caller keeps using the model, so remove the mixed precision that the Trainer wraps around its forward pass.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if watch.held_out:
        watch.held_out.restore(model)
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def _arguments(spec: TrainSpec, folder: Path, device: str, save: bool) -> Any:
    from transformers import TrainingArguments

    place = indexed(torch.device(device))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=spec.warmup,
        lr_scheduler_type="constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
        bf16=spec.dtype == "bfloat16",
        use_cpu=device == "cpu",
        seed=spec.seed,
        data_seed=spec.seed,
        logging_steps=1,
        save_strategy="steps" if save else "no",
        save_steps=spec.save_every or spec.steps,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if device != "cpu":
        # By default the Trainer makes the first device the current one, to which accelerate moves the model, and adds a batch for each
        # other device.
        arguments._n_gpu = 1
        arguments._setup_devices = place
        torch.cuda.set_device(place)
    return arguments


def _trainer(spec: TrainSpec, arguments: Any, model: Any, rows: list[tuple[list[int], int]], watch: Watch) -> Any:
    """Build a Trainer that adds the penalty to the loss and stores held-out losses in its saves."""
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    extra = watch.penalty

    class BrickTrainer(Trainer):  # type: ignore[misc]  # untyped library
        loss_is_scaled_for_ga = True
        penalty = 0.0

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int]:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if len(batches) > 1:
                batches = _similar([row for batch in batches for row in batch], spec.batch_size)
            collated = [packed(b) if spec.packing else b for b in map(watch.objective.collate, batches)]
            return collated, sum(len(batch["targets"]) for batch in collated)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            # The mean over all learned tokens of a step is not the mean of the means of its batches.
            share = len(inputs["targets"]) / num_items_in_batch
            loss: Tensor = watch.objective.loss(model, inputs) * share
            if extra is None:
                return loss
            added = extra() * share
            self.penalty += float(added.detach())
            return loss + added

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if extra is not None and "loss" in logs:
                logs = {**logs, "loss": logs["loss"] - self.penalty, "penalty": self.penalty}
                self.penalty = 0.0
            super().log(logs, start_time)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            # PEFT would ask the hub whether the vocabulary was resized.
            extra = {"save_embedding_layers": False} if hasattr(self.model, "peft_config") else {}
            with disk_errors(Path(str(output_dir))):
                self.model.save_pretrained(output_dir, **extra)
            if watch.held_out:
                watch.held_out.save(Path(str(output_dir)))

    trainer = BrickTrainer(model=model, args=arguments, train_dataset=rows, data_collator=list)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_watcher(watch, arguments.max_steps))
    return trainer


def _watcher(watch: Watch, steps: int) -> Any:
    """Build a Trainer callback that measures the held-out loss, stops early and reports progress."""
    from transformers import TrainerCallback

    held_out = watch.held_out

    class Watcher(TrainerCallback):  # type: ignore[misc]  # untyped library
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if held_out and not held_out.losses:
                watch.callbacks.notice(f"held-out loss {held_out.measure(model, 0):.3f} before training")

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            step = state.global_step
            if held_out and (step >= steps or step % held_out.every == 0):
                held_out.measure(model, step)
                if held_out.exhausted and step < steps:
                    watch.callbacks.notice(
                        f"stopped after step {step}: the held-out loss has not improved since step {held_out.best_step}"
                    )
                    control.should_training_stop = True
            if control.should_training_stop:
                control.should_save = False  # the brick itself is written next

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")  # of what is not sealed, anything may be missing

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                watch.callbacks.progress(
                    state.global_step, steps, float(logs["loss"]), held_out.losses[-1][1] if held_out else None
                )

    return Watcher()

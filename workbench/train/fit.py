"""The optimization: transformers' Trainer on tokenized rows, with held-out losses, early stopping and resuming."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.train.heldout import HeldOut
from workbench.train.objective import CROSS_ENTROPY, Objective
from workbench.train.resume import Saves
from workbench.train.spec import TrainSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Progress = Callable[[int, int, float, float | None], None]
"""Callback that receives the step, the number of steps, the step's loss, and the last held-out loss or None."""
Notice = Callable[[str], None]
"""Callback that receives a line for the user."""


@dataclass(frozen=True)
class Reports:
    """Who hears of a training.

    Attributes:
        progress: Callback after each step.
        notice: Callback for other messages to the user.
    """

    progress: Progress = lambda *_: None
    notice: Notice = lambda _text: None


SILENT = Reports()


def reports(events: Callable[[dict[str, Any]], None], step: str) -> Reports:
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
        told: Who hears of it.
        objective: What the training minimizes.
    """

    held_out: HeldOut | None = None
    penalty: Callable[[], Tensor] | None = None
    saves: Saves = field(default_factory=Saves)
    told: Reports = SILENT
    objective: Objective = CROSS_ENTROPY


def fit(spec: TrainSpec, model: PreTrainedModel, rows: list[tuple[list[int], int]], device: str, watch: Watch) -> list[float]:
    """Run the optimizer and return the loss of each step, without the penalty.

    Args:
        spec: Settings of the training.
        model: The live model, trained in place.
        rows: Token ids and the number of learned tokens, as `encode` returns them, in training order.
        device: "cpu" or a cuda device.
        watch: Hooks into the training.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(
            _arguments(spec, watch.saves.folder or Path(scratch), device, bool(watch.saves.folder)), model, rows, watch
        )
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

    return TrainingArguments(
        output_dir=str(folder),
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
        save_strategy="steps" if save else "no",
        save_steps=spec.save_every or spec.steps,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _trainer(arguments: Any, model: Any, rows: list[tuple[list[int], int]], watch: Watch) -> Any:
    """Build a Trainer that adds the penalty to the loss and stores held-out losses in its saves."""
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    extra = watch.penalty

    class BrickTrainer(Trainer):  # type: ignore[misc]  # untyped library
        penalty = 0.0

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            loss: Tensor = watch.objective.loss(model, inputs)
            if extra is None:
                return loss
            added = extra()
            self.penalty = float(added.detach())
            return loss + added

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if extra is not None and "loss" in logs:
                logs = {**logs, "loss": logs["loss"] - self.penalty, "penalty": self.penalty}
            super().log(logs, start_time)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            # PEFT would ask the hub whether the vocabulary was resized.
            extra = {"save_embedding_layers": False} if hasattr(self.model, "peft_config") else {}
            self.model.save_pretrained(output_dir, **extra)
            if watch.held_out:
                watch.held_out.save(Path(str(output_dir)))

    trainer = BrickTrainer(model=model, args=arguments, train_dataset=rows, data_collator=watch.objective.collate)
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
                watch.told.notice(f"held-out loss {held_out.measure(model, 0):.3f} before training")

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            step = state.global_step
            if held_out and held_out.due(step, step >= steps):
                held_out.measure(model, step)
                if held_out.exhausted and step < steps:
                    watch.told.notice(
                        f"stopped after step {step}: the held-out loss has not improved since step {held_out.best_step}"
                    )
                    control.should_training_stop = True
            if control.should_training_stop:
                control.should_save = False  # the brick itself is written next

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                watch.told.progress(state.global_step, steps, float(logs["loss"]), held_out.losses[-1][1] if held_out else None)

    return Watcher()

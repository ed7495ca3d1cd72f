"""The optimizer: transformers' Trainer on rows of tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workbench.train.rows import collate
from workbench.train.spec import TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, float], None]


def fit(
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

"""Held-out rows: their loss, early stopping, and the weights with the lowest loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.files import write_json
from workbench.lazy import torch
from workbench.train.rows import batch_loss, collate
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

_LOSSES, _BEST = "held_out.json", "held_out.safetensors"


class HeldOut:
    """Held-out rows and the losses measured on them.

    Args:
        rows: Token ids and the number of learned tokens, as `encode` returns them.
        batch_size: Number of rows per forward pass.
        every: Number of steps between two measurements.
        patience: Number of measurements without a lower loss after which training stops. None disables early stopping and
            does not keep the best weights.
    """

    def __init__(self, rows: list[tuple[list[int], int]], batch_size: int, every: int, patience: int | None) -> None:
        # Batches of similar length need less padding. The sort is stable, so the batches are always the same.
        ordered = sorted(rows, key=lambda row: len(row[0]))
        self.batches = [collate(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]
        self.every = every
        self.patience = patience
        self.losses: list[tuple[int, float]] = []
        """Pairs (step, loss); the first one is measured before training."""
        self._best: dict[str, Tensor] = {}

    def due(self, step: int, last: bool) -> bool:
        """Return whether the loss is measured after a step."""
        return last or step % self.every == 0

    def measure(self, model: Any, step: int) -> float:
        """Measure and record the mean loss per learned token; with patience, keep the weights if it is the lowest so far.

        The measurement draws no random numbers, so it does not change the training.
        """
        loss = held_out_loss(model, self.batches)
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

    def record(self, count: int) -> dict[str, Any]:
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


def held_out_loss(model: Any, batches: list[dict[str, Any]]) -> float:
    """Return the mean −log p of the learned tokens of all batches, without dropout, in the same mixed precision as training."""
    device = next(model.parameters()).device
    training, total, count = model.training, 0.0, 0
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        for batch in batches:
            learned = len(batch["targets"])
            total += float(batch_loss(model, {name: value.to(device) for name, value in batch.items()})) * learned
            count += learned
    model.train(training)
    return total / count

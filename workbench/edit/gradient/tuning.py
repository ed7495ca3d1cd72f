"""Training of weight updates on the tokens that follow prompts: updates, losses and the training loop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.edit.places.parts import EditRow, Padded, Parts, fact_pair, padded
from workbench.edit.places.passes import logits_at, run
from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.architecture import is_conv1d
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """Length and speed of a training."""

    epochs: int
    batch_size: int
    learning_rate: float
    stop: float
    """Skip a batch whose loss is below this value."""


class TrainedUpdate(ABC):
    """A trainable update of the weight [out, in] of a live Linear or Conv1D, added to the module's output by a hook."""

    parameters: list[Tensor]
    """Tensors that the optimizer changes."""

    def __init__(self, module: nn.Module, max_change: float | None) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        self.transposed = is_conv1d(module)  # stores [in, out]
        self.rows, self.cols = weight.shape[::-1] if self.transposed else weight.shape
        self.bound = None if max_change is None else below(max_change)
        self.active = True
        """False while the module gives its output without the update."""
        self._hook = module.register_forward_hook(
            lambda _, inputs, output: output + self.output(inputs[0]) if self.active else output
        )

    @abstractmethod
    def output(self, inputs: Tensor) -> Tensor:
        """Return the update's contribution to the module's output."""

    @abstractmethod
    def project(self) -> None:
        """Enforce the bound on the update."""

    @abstractmethod
    def largest(self) -> float:
        """Return the largest absolute value of an element."""

    @abstractmethod
    def factors(self) -> Factors:
        """Return the trained update as factors for the weight as it is stored."""

    def remove(self) -> None:
        """Detach the update from the module."""
        self._hook.remove()


class LowRankUpdate(TrainedUpdate):
    """Low-rank update ΔW = left @ right; left starts as zeros, right as noise (LoRA, Hu et al. 2021, with scale 1).

    Args:
        module: A live Linear or Conv1D.
        rank: Columns of left; at most the shorter side of the weight.
        max_change: Largest absolute value of an element of ΔW; None: no bound.
        generator: Random generator of the noise.
    """

    def __init__(self, module: nn.Module, rank: int, max_change: float | None, generator: torch.Generator) -> None:
        super().__init__(module, max_change)
        device = next(module.parameters()).device
        rank = min(rank, self.rows, self.cols)
        right = torch.randn(rank, self.cols, generator=generator) / self.cols**0.5
        self.right = right.to(device).requires_grad_()
        self.left = torch.zeros(self.rows, rank, device=device, requires_grad=True)
        self.parameters = [self.left, self.right]

    def start_from(self, factors: Factors) -> None:
        """Replace the first terms of the update by those of a product of at most the same rank; the others stay zero.

        Args:
            factors: The product, for the weight as it is stored.
        """
        oriented = factors.transposed() if self.transposed else factors
        with torch.no_grad():
            self.left[:, : oriented.rank] = oriented.left.to(self.left)
            self.right[: oriented.rank] = oriented.right.to(self.right)

    def output(self, inputs: Tensor) -> Tensor:
        """Return the inputs times both factors."""
        update: Tensor = (inputs @ self.right.T) @ self.left.T
        return update

    @no_grad
    def largest(self) -> float:
        """Return the largest absolute value of an element of the product."""
        return float((self.left @ self.right).abs().max())

    @no_grad
    def project(self) -> None:
        """Scale the update down until no element of the product exceeds the bound."""
        while self.bound is not None and (largest := self.largest()) > self.bound:
            self.left.mul_(min(self.bound / largest, 1 - 2**-20))

    def factors(self) -> Factors:
        """Return the factors."""
        factors = Factors(self.left.detach().cpu(), self.right.detach().cpu())
        return factors.transposed() if self.transposed else factors


class DenseUpdate(TrainedUpdate):
    """Update ΔW with all elements free; it starts at zero.

    The update is trained instead of the weight. Gradients and Adam steps are the same, and the result has no rounding from the
    difference of two weights.
    """

    def __init__(self, module: nn.Module, max_change: float | None) -> None:
        super().__init__(module, max_change)
        self.delta = torch.zeros(self.rows, self.cols, device=next(module.parameters()).device, requires_grad=True)
        self.parameters = [self.delta]

    def output(self, inputs: Tensor) -> Tensor:
        """Return the inputs times the matrix."""
        return inputs @ self.delta.T

    @no_grad
    def project(self) -> None:
        """Clip elements to the bound: the nearest matrix with ‖ΔW‖∞ ≤ max_change."""
        if self.bound is not None:
            self.delta.clamp_(-self.bound, self.bound)

    def largest(self) -> float:
        """Return the largest absolute value of an element of the matrix."""
        return float(self.delta.detach().abs().max())

    def factors(self) -> Factors:
        """Return the matrix and an identity as factors."""
        delta = self.delta.detach().cpu()
        return Factors.of_dense(delta.T.contiguous() if self.transposed else delta)


def below(bound: float) -> float:
    """Return the largest float32 that does not exceed `bound`."""
    rounded = torch.tensor(bound, dtype=torch.float32)
    return float(rounded if rounded.item() <= bound else torch.nextafter(rounded, torch.zeros(())))


def rows_of(facts: Iterable[Fact], tokenizer: Any, limit: int | None) -> list[EditRow]:
    """Tokenize facts; each target ends with the end-of-text token if the tokenizer has one.

    Args:
        facts: The facts.
        tokenizer: The base's tokenizer.
        limit: Largest number of tokens that the model accepts; None: no limit.

    Raises:
        WorkbenchError: If a prompt or target has no tokens, or a fact is longer than `limit`; with file and line.
    """
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    rows = []
    for fact in facts:
        pair = fact_pair(fact, tokenizer)
        prompt, target = pair.prompt, (*pair.continuation, *end)
        if limit is not None and len(prompt) + len(target) > limit:
            raise WorkbenchError(
                f"{fact.place}: prompt and target have {len(prompt)} and {len(target)} tokens (with end of text); "
                f"the model accepts {limit} in total",
                "Shorten the target, or split it into several facts.",
            )
        last = len(prompt) - 1
        # The last token is an input too, although its prediction is not used: attention over one position less rounds differently,
        # and edits would no longer be bit-identical to those of earlier versions.
        rows.append(EditRow((*prompt, *target), last, last, target, (last, last + 1)))
    return rows


def token_losses(parts: Parts, batch: Padded) -> Tensor:
    """Return the cross-entropy of each target token of a batch, [place]; the output head runs on these positions only."""
    with logits_at(parts, batch.places):
        logits = run(parts, batch).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")


@dataclass(frozen=True)
class Trained:
    """Numbers of epochs and of optimizer steps of a training, and the largest batch loss of its last epoch."""

    epochs: int
    steps: int
    loss: float


def fit(
    parts: Parts,
    rows: Sequence[EditRow],
    updates: Sequence[TrainedUpdate],
    schedule: Schedule,
    order: torch.Generator,
    progress: Callable[[int, int, str], None],
) -> Trained:
    """Train updates with Adam on shuffled batches, until the loss of every batch is below `stop`.

    Args:
        parts: Parts of a frozen model, with the updates attached.
        rows: Rows to learn.
        updates: The updates to train.
        schedule: Epochs, batch size, learning rate and stop.
        order: Random generator for the order of the rows in every epoch.
        progress: Called with (epoch, epochs, text).

    Raises:
        WorkbenchError: If the loss is not finite.
    """
    optimizer = torch.optim.Adam([p for update in updates for p in update.parameters], lr=schedule.learning_rate)
    worst, steps, epoch = math.inf, 0, 0
    for epoch in range(1, schedule.epochs + 1):
        worst = 0.0
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
        for chosen in chunks(shuffled, schedule.batch_size):
            loss = token_losses(parts, padded(chosen, parts.model.device)).mean()
            value = loss.item()
            if not math.isfinite(value):
                hint = f"Lower learning_rate ({schedule.learning_rate:g})."
                raise WorkbenchError(f"edit finetune: the loss is {value} in epoch {epoch}", hint)
            worst = max(worst, value)
            if value < schedule.stop:
                continue
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for update in updates:
                update.project()
            steps += 1
        progress(epoch, schedule.epochs, f"loss {worst:.3f}")
        if worst < schedule.stop:
            break
    return Trained(epoch, steps, worst)


@no_grad
def row_losses(parts: Parts, rows: Sequence[EditRow], batch_size: int) -> list[float]:
    """Return the mean cross-entropy of each row's target tokens, including the end of text."""
    means: list[float] = []
    for chosen in chunks(rows, batch_size):
        batch = padded(chosen, parts.model.device)
        losses = token_losses(parts, batch)
        means += [losses[batch.owner == i].mean().item() for i in range(len(chosen))]
    return means


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Return consecutive parts of `size` items; the last one may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))

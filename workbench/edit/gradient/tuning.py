"""Training of an update of some weights on tokens that follow prompts: the loss, the update, the epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from workbench.edit.places.parts import Parts
from workbench.edit.places.passes import logits_at, run
from workbench.edit.places.rows import EditRow, Padded, fact_pair, padded
from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.models.architecture import is_conv1d
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast an update is trained."""

    epochs: int
    batch_size: int
    learning_rate: float
    stop: float
    """A batch whose loss is below this is skipped."""


class TrainedUpdate(Protocol):
    """A trainable change of one live weight, added to its module's output while it is trained."""

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer changes."""

    def project(self) -> None:
        """Back into what the change is confined to."""

    def largest(self) -> float:
        """Largest change of an element."""

    def remove(self) -> None:
        """Give the module back its own output."""

    def factors(self) -> Factors:
        """The trained change, for the weight as it is stored."""


class _Hooked:
    """What both kinds of update share: the shape [out, in] of a live Linear or Conv1D, and the hook on its output."""

    def __init__(self, module: nn.Module, max_change: float | None) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.transposed = is_conv1d(module)  # stores [in, out]
        self.rows, self.cols = weight.shape[::-1] if self.transposed else weight.shape
        self.bound = None if max_change is None else below(max_change)
        self._hook = module.register_forward_hook(lambda _, inputs, output: output + self.output(inputs[0]))

    def output(self, inputs: Tensor) -> Tensor:
        """What the update adds to the module's output."""
        raise NotImplementedError

    def remove(self) -> None:
        """Give the module back its own output."""
        self._hook.remove()


class LowRankUpdate(_Hooked):
    """ΔW = left @ right, left starting as zeros and right as noise: LoRA (Hu et al. 2021) with scale 1.

    Args:
        module: A live Linear or Conv1D.
        rank: Columns of left, at most those of the smaller side.
        max_change: Largest |ΔW| of an element; None: any.
        generator: Where the noise comes from.
    """

    def __init__(self, module: nn.Module, rank: int, max_change: float | None, generator: torch.Generator) -> None:
        super().__init__(module, max_change)
        device = next(module.parameters()).device
        rank = min(rank, self.rows, self.cols)
        right = torch.randn(rank, self.cols, generator=generator) / self.cols**0.5
        self.right = right.to(device).requires_grad_()
        self.left = torch.zeros(self.rows, rank, device=device, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """Both factors."""
        return [self.left, self.right]

    def output(self, inputs: Tensor) -> Tensor:
        """Through the rank."""
        update: Tensor = (inputs @ self.right.T) @ self.left.T
        return update

    @torch.no_grad()
    def largest(self) -> float:
        """Of the product."""
        return float((self.left @ self.right).abs().max())

    @torch.no_grad()
    def project(self) -> None:
        """Scaled down, all of it, until no element of the product is above the bound."""
        while self.bound is not None and (largest := self.largest()) > self.bound:
            self.left.mul_(min(self.bound / largest, 1 - 2**-20))

    def factors(self) -> Factors:
        """The factors themselves."""
        factors = Factors(self.left.detach().cpu(), self.right.detach().cpu())
        return factors.transposed() if self.transposed else factors


class DenseUpdate(_Hooked):
    """ΔW with every element free, starting at zero.

    The update is trained, not the weight: the same gradients and the same steps of Adam, and what is returned is what was trained,
    without the rounding of a difference of two weights.
    """

    def __init__(self, module: nn.Module, max_change: float | None) -> None:
        super().__init__(module, max_change)
        self.delta = torch.zeros(self.rows, self.cols, device=next(module.parameters()).device, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """The matrix."""
        return [self.delta]

    def output(self, inputs: Tensor) -> Tensor:
        """One more product of the module's size."""
        return inputs @ self.delta.T

    @torch.no_grad()
    def project(self) -> None:
        """Elements above the bound set to the bound: the nearest matrix within ‖ΔW‖∞ ≤ max_change."""
        if self.bound is not None:
            self.delta.clamp_(-self.bound, self.bound)

    def largest(self) -> float:
        """Of the matrix."""
        return float(self.delta.detach().abs().max())

    def factors(self) -> Factors:
        """The matrix beside an identity."""
        delta = self.delta.detach().cpu()
        return Factors.of_dense(delta.T.contiguous() if self.transposed else delta)


def below(bound: float) -> float:
    """The largest float32 that is not above `bound`."""
    rounded = torch.tensor(bound, dtype=torch.float32)
    return float(rounded if rounded.item() <= bound else torch.nextafter(rounded, torch.zeros(())))


def rows_of(facts: Iterable[Fact], tokenizer: Any, limit: int | None) -> list[EditRow]:
    """Facts as tokens, the end of text among their targets where the tokenizer has one.

    Errors, with file and line: a prompt or target without tokens, more tokens than the model has positions.
    """
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    found = []
    for fact in facts:
        pair = fact_pair(fact, tokenizer)
        prompt, wanted = pair.prompt, (*pair.continuation, *end)
        if limit is not None and len(prompt) + len(wanted) > limit:
            raise WorkbenchError(
                f"{fact.place}: prompt and target have {len(prompt)} and {len(wanted)} tokens, end of text included; "
                f"the model takes {limit} together",
                "Shorten the target, or split it into several facts.",
            )
        last = len(prompt) - 1
        # The last token is read too, though nobody asks what follows it: attention over one position less rounds differently,
        # and edits solved by earlier versions would no longer be the same to the bit.
        found.append(EditRow((*prompt, *wanted), last, last, wanted, (last, last + 1)))
    return found


def token_losses(parts: Parts, batch: Padded) -> Tensor:
    """Cross-entropy of each target token of a batch, [place]: the vocabulary projection runs on these places alone."""
    with logits_at(parts, batch.places):
        logits = run(parts, batch).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), batch.wanted, reduction="none")


def fit(
    parts: Parts,
    rows: Sequence[EditRow],
    updates: Sequence[TrainedUpdate],
    schedule: Schedule,
    order: torch.Generator,
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Epochs over all rows in shuffled batches with Adam, until every batch's loss is below `stop`.

    Args:
        parts: Of a frozen model; the updates hang on it.
        rows: What is learned.
        order: Draws the order of the rows of every epoch.
        progress: (epoch, epochs, text)

    Returns:
        Epochs, steps of the optimizer and the last epoch's largest batch loss. Errors: a loss that is no finite number.
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
    return {"epochs": epoch, "steps": steps, "loss": worst}


@torch.no_grad()
def row_losses(parts: Parts, rows: Sequence[EditRow], batch_size: int) -> list[float]:
    """Mean cross-entropy of each row's target tokens, end of text included."""
    found: list[float] = []
    for chosen in chunks(rows, batch_size):
        batch = padded(chosen, parts.model.device)
        losses = token_losses(parts, batch)
        found += [losses[batch.owner == i].mean().item() for i in range(len(chosen))]
    return found


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive parts of `size` items; the last one may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))

"""Training of an update of some weights on tokens that follow prompts: the loss, the update, the epochs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import nn

IGNORED = -100
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One fact as tokens.

    Attributes:
        id: The fact's.
        tokens: Prompt, target and, where the tokenizer has one, end of text.
        start: Where the target starts in `tokens`.
    """

    id: str
    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Schedule:
    """How long and how fast an update is trained."""

    epochs: int
    batch_size: int
    learning_rate: float
    stop: float
    """A batch whose loss is below this is skipped."""


class Update(Protocol):
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
        self.transposed = type(module).__name__ == "Conv1D"  # stores [in, out]
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
        rank: Columns of left.
        max_change: Largest |ΔW| of an element; None: any.
        generator: Where the noise comes from.
    """

    def __init__(self, module: nn.Module, rank: int, max_change: float | None, generator: torch.Generator) -> None:
        super().__init__(module, max_change)
        device = next(module.parameters()).device
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


def rows_of(facts: Iterable[Fact], tokenizer: Any, limit: int | None) -> list[Row]:
    """Facts as tokens. Errors, with file and line: a prompt or target without tokens, more tokens than the model has positions."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for fact in facts:
        prompt = tokenizer(fact.text)["input_ids"]
        target = tokenizer(fact.continuation, add_special_tokens=False)["input_ids"]
        where = f"edit finetune: {fact.place}: " if fact.place else "edit finetune: "
        if not prompt or not target:
            text = fact.continuation if prompt else fact.text
            raise WorkbenchError(
                f"{where}{text!r} has no tokens in the base's vocabulary", "Word the fact in what the tokenizer knows."
            )
        tokens = (*prompt, *target, *end)
        if limit is not None and len(tokens) > limit:
            raise WorkbenchError(
                f"{where}prompt and target have {len(tokens)} tokens ({len(prompt)} and {len(target)}); the model takes {limit}",
                "Shorten the target, or cut it into several facts.",
            )
        found.append(Row(fact.id, tokens, len(prompt)))
    return found


def token_losses(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target token.

    Args:
        model: A live causal model.
        rows: A batch, padded on the right here.

    Returns:
        Losses [row, position], 0 where there is no target; and which positions have one, bool of the same shape. Positions are those
        that predict a target token of at least one row: the vocabulary projection runs on no other, where the model lets us choose.
    """
    width = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        end = len(row.tokens)
        tokens[i, :end] = torch.tensor(row.tokens)
        mask[i, :end] = 1
        labels[i, row.start : end] = torch.tensor(row.tokens[row.start :])
    wanted = labels[:, 1:] != IGNORED
    # As indices, not as a slice: a slice is not contiguous, and the projection would copy its matrix for each row.
    positions = wanted.any(0).nonzero().flatten()
    device = model.device
    inputs: dict[str, Any] = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=positions.to(device)).logits
    else:
        logits = model(**inputs).logits[:, positions]
    targets = labels[:, positions + 1].to(device)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape), wanted[:, positions].to(device)


def fit(
    model: Any,
    rows: Sequence[Row],
    updates: Sequence[Update],
    schedule: Schedule,
    order: torch.Generator,
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Epochs over all rows in shuffled batches with Adam, until every batch's loss is below `stop`.

    Args:
        model: Frozen; the updates hang on it.
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
        for batch in chunks(shuffled, schedule.batch_size):
            losses, wanted = token_losses(model, batch)
            loss = losses.sum() / wanted.sum()
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
def fact_losses(model: Any, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
    """Fact id -> mean cross-entropy of its target tokens, end of text included."""
    found = {}
    for batch in chunks(rows, batch_size):
        losses, wanted = token_losses(model, batch)
        for row, loss in zip(batch, (losses.sum(1) / wanted.sum(1)).tolist(), strict=True):
            found[row.id] = round(loss, 4)
    return found


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive parts of `size` items; the last one may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))

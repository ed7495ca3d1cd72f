"""Training of low-rank updates on facts while the model keeps its own predictions on prompts and texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.edit.gradient.lessons import Drawn, Lesson
from workbench.edit.gradient.tuning import HookedUpdate, LowRankUpdate, chunks, token_losses
from workbench.edit.places.parts import Parts
from workbench.edit.places.passes import logits_at, run
from workbench.edit.places.rows import EditRow, padded
from workbench.errors import WorkbenchError
from workbench.lazy import no_grad, torch
from workbench.models.hooks import mean_divergence

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Course:
    """Settings of a training.

    Attributes:
        epochs: Largest number of passes over the facts.
        batch_size: Number of facts, and of prompts to preserve, in a step.
        learning_rate: Adam's step size.
        stop: Training ends after an epoch in which the loss of every row and every mean divergence was below this value, in nats.
        end_weight: Weight of the end-of-text token; the target's tokens together have weight 1.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    stop: float
    end_weight: float


@dataclass(frozen=True)
class Kept:
    """Rows on which the model keeps the distributions that it had without the updates.

    Attributes:
        name: Name in the record.
        rows: The rows; the distributions at their targets count.
        weight: Weight of the mean divergence.
        batch: Number of rows in a step.
    """

    name: str
    rows: Sequence[EditRow]
    weight: float
    batch: int


def train(
    parts: Parts,
    lessons: Sequence[Lesson],
    kept: Sequence[Kept],
    updates: Sequence[LowRankUpdate],
    course: Course,
    generator: torch.Generator,
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Train updates with Adam; each step draws a batch of facts and a batch of each kind of rows to keep.

    The loss of a step is the mean of `row_losses` over the facts' rows, plus each weight times the mean over targets of KL(without the
    updates ‖ with them). The gradients of the terms are added one after another, so that memory holds one of them.

    Args:
        parts: Parts of a frozen model, with the updates attached.
        lessons: The facts.
        kept: Rows whose distributions are kept.
        updates: The updates.
        course: Settings of the training.
        generator: Random generator of all draws.
        progress: Called with (epoch, epochs, text).

    Returns:
        Number of epochs and of steps, and the mean of each term over the last epoch.

    Raises:
        WorkbenchError: If the loss is not finite.
    """
    optimizer = torch.optim.Adam([p for update in updates for p in update.parameters], lr=course.learning_rate)
    pools = [(one, Drawn(one.rows, generator)) for one in kept if one.rows and one.weight]
    steps, epoch, means = 0, 0, dict[str, float]()
    for epoch in range(1, course.epochs + 1):
        worst, terms = 0.0, list[dict[str, float]]()
        order = torch.randperm(len(lessons), generator=generator).tolist()
        for chosen in chunks(order, course.batch_size):
            optimizer.zero_grad()
            rows = [row for i in chosen for row in lessons[i].drawn(generator)]
            losses = row_losses(parts, rows, course.end_weight, ends=lessons[0].ends)[0]
            loss = losses.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            worst = max(worst, float(losses.detach().max()))
            terms.append({"facts": float(loss.detach())})
            for one, pool in pools:
                divergence = kept_loss(parts, pool.take(one.batch), updates)
                (one.weight * divergence).backward()  # type: ignore[no-untyped-call]
                terms[-1][one.name] = float(divergence.detach())
            if not all(math.isfinite(value) for value in terms[-1].values()):
                hint = f"Lower learning_rate ({course.learning_rate:g})."
                raise WorkbenchError(f"edit adapter: the loss is not finite in epoch {epoch}: {terms[-1]}", hint)
            optimizer.step()
            steps += 1
        means = {name: round(sum(term[name] for term in terms) / len(terms), 5) for name in terms[0]}
        progress(epoch, course.epochs, "loss " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
        if max(worst, *(means[one.name] for one, _ in pools), 0.0) < course.stop:
            break
    return {"epochs": epoch, "steps": steps, "loss": means}


def row_losses(parts: Parts, rows: Sequence[EditRow], end_weight: float, *, ends: bool) -> tuple[Tensor, Tensor]:
    """Return the losses of rows, and each row's mean −log p over the tokens of its target without the end of text.

    The loss of a row is that mean, plus `end_weight` times −log p(end of text).

    Args:
        parts: Parts of the model.
        rows: The rows.
        end_weight: Weight of the end-of-text token.
        ends: True if the last token of every target is the end of text.

    Returns:
        Two tensors [row].
    """
    batch = padded(rows, parts.model.device)
    losses = token_losses(parts, batch)
    lengths = [len(row.target) - ends for row in rows]
    in_target = [True] * len(losses)
    if ends:
        position = -1
        for row in rows:
            position += len(row.target)
            in_target[position] = False
    mask = torch.tensor(in_target, device=losses.device)
    sizes = torch.tensor(lengths, dtype=losses.dtype, device=losses.device)
    targets = torch.zeros_like(sizes).index_add(0, batch.owner[mask], losses[mask]) / sizes
    return (targets + end_weight * losses[~mask] if ends else targets), targets


def kept_loss(parts: Parts, rows: Sequence[EditRow], updates: Sequence[HookedUpdate]) -> Tensor:
    """Return the mean over targets of KL(without the updates ‖ with them), in nats."""
    batch = padded(rows, parts.model.device)
    with logits_at(parts, batch.places):
        with torch.no_grad(), silent(updates):
            wanted = run(parts, batch).logits[0]
        return mean_divergence(wanted, run(parts, batch).logits[0])


@no_grad
def target_losses(parts: Parts, lessons: Sequence[Lesson], batch_size: int) -> list[float]:
    """Return the mean −log p per token of each fact's target after its own prompt."""
    losses: list[float] = []
    for chosen in chunks(lessons, batch_size):
        losses += row_losses(parts, [lesson.plain for lesson in chosen], 0.0, ends=chosen[0].ends)[1].tolist()
    return losses


@contextmanager
def silent(updates: Sequence[HookedUpdate]) -> Iterator[None]:
    """Run the model without the updates within the block."""
    try:
        for update in updates:
            update.active = False
        yield
    finally:
        for update in updates:
            update.active = True

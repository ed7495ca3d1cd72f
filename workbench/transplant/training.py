"""A few steps of training of a carried adapter, whose updates act beside the weights of a live model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.lazy import torch
from workbench.models.batching import side_by_side
from workbench.models.divergence import mean_divergence
from workbench.models.hooks import frozen, hooked
from workbench.models.texts import TextRow
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@contextmanager
def acting(model: PreTrainedModel, updates: Mapping[str, Factors]) -> Iterator[None]:
    """Add updates to the outputs of linear layers inside the block: y + B A x.

    Args:
        model: The live model.
        updates: Module -> (B [outputs, rank], A [rank, inputs]) as `left` and `right`, on the model's device.
    """

    def after(update: Factors) -> Any:
        def add(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + ((args[0] @ update.right.T) @ update.left.T)

        return add

    with ExitStack() as stack:
        for name, update in updates.items():
            stack.enter_context(hooked(model.get_submodule(name), after=after(update)))
        yield


BATCH = 8
"""Texts of a step."""
LEARNING_RATE = 1e-3
"""Learning rate of AdamW by default, as in the training of new adapters."""
_CLIP = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class Teacher:
    """The source with its brick, which reads the same tokens as the target.

    Attributes:
        model: The live source.
        updates: Its brick by module.
    """

    model: PreTrainedModel
    updates: Mapping[str, Factors]


@dataclass(frozen=True)
class Course:
    """Settings of a training.

    Attributes:
        steps: Number of steps of AdamW.
        learning_rate: The learning rate, which falls to zero as a cosine.
        seed: Seed of the order of the texts.
    """

    steps: int
    learning_rate: float = LEARNING_RATE
    seed: int = 0


def distil(
    model: PreTrainedModel,
    updates: Mapping[str, Factors],
    rows: Sequence[TextRow],
    course: Course,
    teacher: Teacher | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> tuple[dict[str, Factors], list[float]]:
    """Train the factors of updates on texts, with the model frozen.

    The loss is the mean over the learned tokens: of KL(teacher ‖ model) if there is a teacher, else of −log p(token).

    Args:
        model: The live target.
        updates: Module -> its update.
        rows: Texts as the target's tokens; a batch has `BATCH` of them.
        course: Settings of the training.
        teacher: The source with its brick.
        progress: Receives (step, steps, text).

    Returns:
        The trained updates, and the loss of each step in nats.
    """
    device = next(model.parameters()).device
    factors = {
        name: Factors(*(part.detach().clone().to(device).requires_grad_(True) for part in (one.left, one.right)))
        for name, one in updates.items()
    }
    learned = [part for one in factors.values() for part in (one.left, one.right)]
    optimizer = torch.optim.AdamW(learned, lr=course.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.steps)
    generator = torch.Generator().manual_seed(course.seed)
    order: list[int] = []
    measured = []
    with frozen(model):
        for step in range(course.steps):
            while len(order) < min(BATCH, len(rows)):
                order += torch.randperm(len(rows), generator=generator).tolist()
            batch, order = [rows[i] for i in order[:BATCH]], order[BATCH:]
            loss = _loss(model, factors, batch, teacher)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learned, _CLIP)
            optimizer.step()
            schedule.step()
            measured.append(float(loss.detach()))
            progress(step + 1, course.steps, f"loss {measured[-1]:.3f}")
    trained = {name: Factors(one.left.detach().cpu(), one.right.detach().cpu()) for name, one in factors.items()}
    return trained, measured


def _loss(model: PreTrainedModel, factors: Mapping[str, Factors], rows: Sequence[TextRow], teacher: Teacher | None) -> Tensor:
    """Return the mean loss over the learned tokens of a batch."""
    batch = side_by_side([row.tokens for row in rows], next(model.parameters()).device)
    places = [(b, t) for b, row in enumerate(rows) for t in range(len(row.tokens) - row.learned, len(row.tokens))]
    index, position = (torch.tensor(part, device=batch.tokens.device) for part in zip(*places, strict=True))
    with acting(model, factors):
        logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits[index, position - 1].float()
    if teacher is None:
        return torch.nn.functional.cross_entropy(logits, batch.tokens[index, position])
    with torch.no_grad(), acting(teacher.model, teacher.updates):
        wanted = teacher.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits[index, position - 1]
    return mean_divergence(wanted, logits)

"""Joint training of the values of all facts, on the model with the whole update and beside the prompts that must not change.

Values are optimized one by one, each on the model without the other facts. Two things remain unseen: facts disturb each other through
keys that are not orthogonal, and ΔW acts on the keys of other prompts. With A of the solve fixed, ΔW = R Aᵀ is linear in the values R,
and R is trained here with Adam: the outputs of the projection move by (x A) Rᵀ at every token. Where ΔW may act stays the choice of
the method's metric, because A stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workbench.edit.gradient.balanced import Kept, kept_loss, row_losses
from workbench.edit.gradient.lessons import (
    CONTINUED,
    REPLAY_TEXTS,
    REPLAY_TOKENS,
    REPLAYED,
    Drawn,
    Lesson,
    continued,
    prompt_rows,
    text_rows,
)
from workbench.edit.gradient.tuning import HookedUpdate, chunks
from workbench.edit.places.parts import Parts
from workbench.edit.places.rows import EditRow, row_of
from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.files import json_digest
from workbench.lazy import no_grad, torch
from workbench.models.hooks import frozen
from workbench.models.texts import Text, encode
from workbench.steps import MethodContext
from workbench.steps.fields import Real, Strict, Whole
from workbench.weights.digests import tensor_digest
from workbench.weights.parallel import one_thread
from workbench.weights.saving import save_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

FACTS_AT_ONCE = 16
"""Number of rows of facts in a forward and backward pass."""
KEPT_AT_ONCE = 8
"""Number of prompts or texts to keep in a forward and backward pass: the head gives five distributions for each prompt."""
KEPT_A_STEP = 8
"""Smallest number of prompts to keep in a step; with more than twice as many facts, half as many as facts."""
MEASURED = 32
"""Largest number of prompts to keep whose divergence is measured before and after the training."""
_VERSION = 1


class JointValues(Strict):
    """Training of the values of all facts together, after each has been optimized alone."""

    steps: Whole = Field(25, ge=0)
    """Number of Adam steps. Each covers all facts, in turn in their own wording and after one of the `contexts`; 0 leaves the values
    as they are."""
    learning_rate: Real = Field(0.05, gt=0, le=10)
    """Length of the first step of a value, relative to the norm of the projection's output at its fact; later steps shrink linearly."""
    kl: Real = Field(4.0, ge=0)
    """Weight of the divergence from the model before the step, on prompts that must not change and the four tokens that this model
    gives after them. The mean loss of the facts has weight 1."""
    generated: Whole = Field(128, ge=0)
    """Number of generated prompts (the facts' own wordings with other subjects) for this divergence, beside those of `preserve`. They
    do not enter the metric. A larger `preserve_generated` counts instead."""
    text_kl: Real = Field(0.0, ge=0)
    """Weight of the divergence on the text for statistics."""

    def tokens(self, facts: int, prompts: int, row: int) -> int:
        """Return the tokens of all passes, in which a forward and a backward pass count once.

        Args:
            facts: Number of facts.
            prompts: Number of prompts whose distributions are kept.
            row: Tokens of a prompt with its target.
        """
        kept = 2 * min(prompts, max(KEPT_A_STEP, facts // 2)) * (row + CONTINUED) + 2 * REPLAYED * REPLAY_TOKENS * bool(
            self.text_kl
        )
        return prompts * CONTINUED * row + self.steps * (facts * row + kept)


@dataclass(frozen=True)
class Solution:
    """Values and the solved factor of one layer.

    Attributes:
        layer: The layer.
        changes: R as rows [n, d_out].
        right: Aᵀ [n, d_in].
        anchors: [n], norm of the projection's output at each fact before the edit.
    """

    layer: int
    changes: Tensor
    right: Tensor
    anchors: Tensor


class TrainedValues(HookedUpdate):
    """Update ΔW = R Aᵀ of a projection, of which R is trained; it is added to the projection's output at every token.

    R is its start plus `moved`, in units of each fact's output, so that Adam's step size means the same for every fact and model.

    Args:
        module: A live Linear or Conv1D.
        solution: R, Aᵀ and the norms of outputs.
    """

    def __init__(self, module: nn.Module, solution: Solution) -> None:
        super().__init__(module, None)
        weight = next(module.parameters())
        self.start, self.right = solution.changes.to(weight), solution.right.to(weight)
        self.unit = (solution.anchors / self.rows**0.5)[:, None].to(weight)
        self.moved = torch.zeros_like(self.start, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """Tensors that the optimizer changes."""
        return [self.moved]

    @property
    def changes(self) -> Tensor:
        """R as rows [n, d_out]."""
        changes: Tensor = self.start + self.unit * self.moved
        return changes

    def output(self, inputs: Tensor) -> Tensor:
        """Return (x A) Rᵀ for inputs x."""
        update: Tensor = (inputs @ self.right.T) @ self.changes
        return update


@dataclass(frozen=True)
class Training:
    """Everything that the training of values reads, besides the values.

    Attributes:
        settings: Steps, step size and weights.
        lessons: The facts in their how.
        prompts: Prompts whose distributions are kept, without a continuation.
        texts: Texts whose distributions are kept.
        end: The end-of-text token; None: there is none.
        confidence: Mean probability of a target's tokens that is enough: a fact is not pushed beyond it.
    """

    settings: JointValues
    lessons: Sequence[Lesson]
    prompts: Sequence[EditRow] = ()
    texts: Sequence[EditRow] = ()
    end: int | None = None
    confidence: float = 1.0

    @property
    def enough(self) -> float:
        """Loss at that confidence, in nats."""
        return -math.log(self.confidence)

    def key(self) -> list[Any]:
        """Return what a cache key must cover."""
        facts = [[[row.tokens, row.start, row.target] for row in (one.plain, *one.others)] for one in self.lessons]
        kept = [[[row.tokens, row.start] for row in rows] for rows in (self.prompts, self.texts)]
        return [self.settings.model_dump(mode="json"), facts, kept, self.end, self.confidence]

    def kept(self, parts: Parts) -> list[Kept]:
        """Return the rows to keep, prompts with the model's own continuation; those with weight 0 are left out."""
        kept, settings = list[Kept](), self.settings
        if self.prompts and settings.kl:
            answers = continued(parts, self.prompts, CONTINUED, self.end)
            kept.append(Kept("neighbours", answers, settings.kl, max(KEPT_A_STEP, len(self.lessons) // 2)))
        if self.texts and settings.text_kl:
            kept.append(Kept("text", self.texts, settings.text_kl, REPLAYED))
        return kept


@dataclass(frozen=True)
class LessonSettings:
    """How facts and texts become rows, and when a fact is learned.

    Attributes:
        beginnings: Texts before the facts' prompts.
        end: Whether targets end with the end-of-text token.
        texts: The text for statistics, in parts.
        longest: Largest number of tokens of a row.
        confidence: Mean probability of a target's tokens that is enough.
    """

    beginnings: Sequence[str]
    end: bool
    texts: Sequence[str]
    longest: int
    confidence: float = 1.0


def training_of(
    context: MethodContext, settings: JointValues, facts: Sequence[Fact], prompts: Sequence[Fact], how: LessonSettings
) -> Training:
    """Tokenize what the training reads.

    Args:
        context: The tokenizer.
        settings: Settings of the training.
        facts: The facts that are written.
        prompts: Prompts whose distributions are kept.
        how: How facts and texts become rows, and when a fact is learned.

    Raises:
        WorkbenchError: If a prompt is too long.
    """
    tokenizer, lessons = context.tokenizer, []
    for fact in facts:
        plain, *others = (row_of(fact, tokenizer, "prompt_last", before, how.end) for before in ("", *how.beginnings))
        lessons.append(Lesson(plain, tuple(others), ends=False))  # an end of text counts as a token of the target, as in `values`
    texts: list[EditRow] = []
    if settings.text_kl:
        parts = [Text("", text, "the text for statistics") for text in how.texts if len(text.split()) > 1]
        texts = text_rows(encode(parts[:REPLAY_TEXTS], tokenizer, min(REPLAY_TOKENS, how.longest)))
    end = tokenizer.eos_token_id
    rows = prompt_rows(prompts, tokenizer, how.longest)
    return Training(settings, lessons, rows, texts, None if end is None else int(end), how.confidence)


def trained_changes(
    context: MethodContext, parts: Parts, solutions: Sequence[Solution], training: Training
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Return layer -> trained R [n, d_out] in float32, and the record of the training, from the cache if they are there.

    Args:
        context: Model, tokenizer, seed, cache and progress.
        parts: Parts of the model, which is the one before the step.
        solutions: Values and factors of all layers.
        training: Facts, prompts and settings.

    Raises:
        WorkbenchError: If the loss is not finite.
    """
    from safetensors import safe_open

    solved = [[s.layer, *(tensor_digest(t.float()) for t in (s.changes, s.right, s.anchors))] for s in solutions]
    key = json_digest([_VERSION, context.model_key, context.seed, solved, training.key()])
    file = context.cache / "joint_values" / f"{key}.safetensors"
    if not file.is_file():
        generator = torch.Generator().manual_seed(context.seed % 2**63)
        with frozen(context.model), one_thread():
            changes, record = train(parts, solutions, training, generator, context.progress)
        tensors = {str(layer): tensor.contiguous() for layer, tensor in changes.items()}
        save_tensors(tensors, file, {"record": json.dumps(record)})
    with safe_open(file, "pt") as stored:
        return {s.layer: stored.get_tensor(str(s.layer)) for s in solutions}, json.loads(stored.metadata()["record"])


def train(
    parts: Parts,
    solutions: Sequence[Solution],
    training: Training,
    generator: torch.Generator,
    progress: Callable[[int, int, str], None],
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Train the values of all layers together.

    A step takes every fact in its own wording, or every second step in another, and some of the rows to keep. Its loss is the mean over facts' rows of
    max(0, −log p + log confidence) with the target's mean −log p, plus each weight times the mean over tokens of KL(without the update ‖ with it). Gradients are added batch
    by batch, so that memory holds one batch.

    Args:
        parts: Parts of a frozen model, without the updates.
        solutions: Values and factors of all layers.
        training: Facts, prompts and settings.
        generator: Random generator of all draws.
        progress: Called with (step, steps, text).

    Returns:
        Layer -> R as rows [n, d_out], and the record: steps, number of prompts, and each loss before and after.

    Raises:
        WorkbenchError: If the loss is not finite.
    """
    settings, kept = training.settings, training.kept(parts)
    pools = [(one, Drawn(one.rows, generator)) for one in kept]
    updates: dict[int, TrainedValues] = {}
    try:
        for solution in solutions:
            updates[solution.layer] = TrainedValues(parts.out(solution.layer), solution)
        active = list(updates.values())
        optimizer = torch.optim.Adam([p for update in active for p in update.parameters], lr=settings.learning_rate)
        before = measured(parts, training.lessons, kept, active)
        for step in range(1, settings.steps + 1):
            optimizer.zero_grad()
            rows = [lesson.drawn(generator)[0 if step % 2 else -1] for lesson in training.lessons]
            drawn = [(one, pool.take(one.batch)) for one, pool in pools]
            terms = gradients(parts, rows, drawn, active, training.enough)
            if not all(math.isfinite(value) for value in terms.values()):
                hint = f"Lower its learning_rate ({settings.learning_rate:g})."
                raise WorkbenchError(f"joint_values: the loss is not finite in step {step}: {terms}", hint)
            for group in optimizer.param_groups:  # shorter steps at the end, because Adam's do not shrink with the gradient
                group["lr"] = settings.learning_rate * (1 - (step - 1) / settings.steps)
            optimizer.step()
            listed = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
            progress(step, settings.steps, f"joint values: loss {listed}")
        after = measured(parts, training.lessons, kept, active)
        changes = {layer: update.changes.detach().cpu() for layer, update in updates.items()}
    finally:
        for update in updates.values():
            update.remove()
    return changes, {"steps": settings.steps, "prompts": len(training.prompts), "before": before, "after": after}


def gradients(
    parts: Parts,
    rows: Sequence[EditRow],
    kept: Sequence[tuple[Kept, Sequence[EditRow]]],
    updates: Sequence[TrainedValues],
    enough: float = 0.0,
) -> dict[str, float]:
    """Add the gradients of a step's loss to the updates' parameters, and return its terms without their weights.

    Args:
        parts: Parts of the model, with the updates attached.
        rows: Rows of facts.
        kept: Kinds of rows to keep, each with the rows of this step.
        updates: The updates.
        enough: Loss in nats that a row of a fact need not fall below.
    """
    terms = {"facts": 0.0}
    for chosen in chunks(rows, FACTS_AT_ONCE):
        losses = row_losses(parts, chosen, 0.0, ends=False)[0]
        missing = (losses - enough).clamp(min=0).sum() / len(rows)
        missing.backward()  # type: ignore[no-untyped-call]
        terms["facts"] += float(losses.detach().sum()) / len(rows)
    for one, taken in kept:
        terms[one.name] = 0.0
        for chosen, share in _parts_of(taken):
            divergence = share * kept_loss(parts, chosen, updates)
            (one.weight * divergence).backward()  # type: ignore[no-untyped-call]
            terms[one.name] += float(divergence.detach())
    return terms


@no_grad
def measured(parts: Parts, lessons: Sequence[Lesson], kept: Sequence[Kept], updates: Sequence[TrainedValues]) -> dict[str, float]:
    """Return the mean loss of the facts over all wordings, and the mean divergence of each kind of rows over its first `MEASURED`."""
    rows = [row for lesson in lessons for row in (lesson.plain, *lesson.others)]
    losses = [row_losses(parts, chosen, 0.0, ends=False)[0] for chosen in chunks(rows, FACTS_AT_ONCE)]
    found = {"facts": float(torch.cat(losses).mean())}
    for one in kept:
        found[one.name] = sum(
            share * float(kept_loss(parts, chosen, updates)) for chosen, share in _parts_of(one.rows[:MEASURED])
        )
    return {name: round(value, 5) for name, value in found.items()}


def _parts_of(rows: Sequence[EditRow]) -> list[tuple[Sequence[EditRow], float]]:
    """Return batches of rows to keep, each with its share of all their predicted tokens."""
    total = sum(len(row.target) for row in rows)
    return [(chosen, sum(len(row.target) for row in chosen) / total) for chosen in chunks(rows, KEPT_AT_ONCE)]

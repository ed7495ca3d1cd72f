"""Training of an adapter on facts in several wordings, while the model keeps its own predictions on prompts and texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from workbench.edit.gradient.neurons import ROWS_AT_ONCE
from workbench.edit.gradient.tuning import LowRankUpdate, TrainedUpdate, chunks, token_losses
from workbench.edit.places.parts import EditRow, Padded, Parts, padded, row_of
from workbench.edit.places.passes import Packer, logits_at, packer, run
from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import hooked, mean_divergence
from workbench.models.prompts import encode_rendered
from workbench.models.texts import TextRow

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


CONTINUED = 4
"""Number of the base's own tokens after a preserved prompt whose distributions are preserved too."""
REPLAYED = 2
"""Number of texts in a step."""
REPLAY_TOKENS = 64
REPLAY_TEXTS = 256
"""Number of texts that are tokenized, evenly spaced over the file."""


@dataclass(frozen=True)
class Wordings:
    """Wordings of facts, besides their own prompts.

    Attributes:
        beginnings: Texts before the prompt.
        paraphrases: True if the facts' paraphrases count.
        chat: True if the prompt also counts as a user's message in the tokenizer's chat template.
    """

    beginnings: Sequence[str]
    paraphrases: bool
    chat: bool


@dataclass(frozen=True)
class Lesson:
    """A fact as rows of tokens.

    Attributes:
        plain: The fact's own prompt and target.
        others: The same target after its other wordings.
        ends: True if every target ends with the end-of-text token.
    """

    plain: EditRow
    others: tuple[EditRow, ...]
    ends: bool

    def drawn(self, generator: torch.Generator) -> list[EditRow]:
        """Return the fact's own row and one random other wording, if it has any."""
        if not self.others:
            return [self.plain]
        return [self.plain, self.others[int(torch.randint(len(self.others), (1,), generator=generator))]]


def lessons_of(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, wordings: Wordings, longest: int) -> list[Lesson]:
    """Tokenize facts in all wordings; every target ends with the end-of-text token if the tokenizer has one.

    Args:
        facts: The facts.
        tokenizer: The base's tokenizer.
        wordings: The wordings besides the facts' own prompts.
        longest: Largest number of tokens of a row. Beginnings and chat forms beyond it are left out.

    Raises:
        WorkbenchError: If a paraphrase is longer, or the tokenizer has no chat template although `wordings` asks for it.
    """
    if wordings.chat and not getattr(tokenizer, "chat_template", None):
        raise WorkbenchError("edit adapter: the base's tokenizer has no chat template", "Remove `chat: true`.")
    lessons = []
    for fact in facts:
        others = [row_of(fact, tokenizer, "prompt_last", before, end=True) for before in wordings.beginnings]
        if wordings.chat:
            message = [{"role": "user", "content": fact.text}]
            prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            pair = encode_rendered(tokenizer, prompt, fact.target)
            end = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
            others.append(_row(pair.prompt, (*pair.continuation, *end)))
        others = [row for row in others if len(row.tokens) <= longest]
        for text in fact.paraphrases if wordings.paraphrases else ():
            row = row_of(replace(fact, prompt=text, subject=None), tokenizer, "prompt_last", end=True)
            if len(row.tokens) > longest:
                raise WorkbenchError(
                    f"{fact.place}: the paraphrase {text[:40]!r} has {len(row.tokens)} tokens with its target; at most {longest} are allowed",
                    "Shorten it, or set `paraphrases: false`.",
                )
            others.append(row)
        plain = row_of(fact, tokenizer, "prompt_last", end=True)
        lessons.append(Lesson(plain, tuple(others), tokenizer.eos_token_id is not None))
    return lessons


def _row(prompt: Sequence[int], target: Sequence[int]) -> EditRow:
    """Return a row whose last token is only predicted."""
    last = len(prompt) - 1
    return EditRow((*prompt, *target[:-1]), last, last, tuple(target), (last, last + 1))


def prompt_rows(prompts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[EditRow]:
    """Tokenize prompts whose distributions are preserved.

    Args:
        prompts: The prompts.
        tokenizer: The base's tokenizer.
        longest: Largest number of tokens of a prompt with its continuation.

    Raises:
        WorkbenchError: If a prompt is too long to be continued.
    """
    rows = [row_of(prompt, tokenizer, "prompt_last").prompt for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row.tokens) > longest - CONTINUED:
            raise WorkbenchError(
                f"{prompt.place}: the prompt has {len(row.tokens)} tokens; at most {longest - CONTINUED} are allowed",
                "Shorten it, or remove it from `preserve`.",
            )
    return rows


@no_grad
def continued(parts: Parts, prompts: Sequence[EditRow], count: int, end: int | None) -> list[EditRow]:
    """Return prompts with the model's own greedy continuation as target.

    Args:
        parts: Parts of the model.
        prompts: Rows without a target.
        count: Number of tokens of the continuation.
        end: The end-of-text token, which ends a continuation; None: there is none.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tokens)
    targets: dict[int, list[int]] = {i: [] for i in order}
    batched = packer(parts, prompts)
    for growing in map(list, chunks(order, ROWS_AT_ONCE)):
        for _ in range(count):
            batch = batched([_row((*prompts[i].tokens, *targets[i]), (0,)) for i in growing])
            with logits_at(parts, batch.places):
                best = run(parts, batch).logits[0].argmax(-1).tolist()
            for i, token in zip(growing, best, strict=True):
                targets[i].append(int(token))
            growing = [i for i in growing if targets[i][-1] != end]
            if not growing:
                break
    return [_row(prompt.tokens, targets[i]) for i, prompt in enumerate(prompts)]


def text_rows(rows: Iterable[TextRow]) -> list[EditRow]:
    """Return texts as rows whose targets are their learned tokens."""
    return [_row(row.tokens[: -row.learned], row.tokens[-row.learned :]) for row in rows]


def drawn(rows: Sequence[EditRow], generator: torch.Generator) -> Iterator[EditRow]:
    """Yield rows in a random order that begins again when all have been drawn."""
    while True:
        yield from (rows[i] for i in torch.randperm(len(rows), generator=generator).tolist())


END_WEIGHT = 0.1
"""Weight of the end-of-text token after a target, whose tokens together have weight 1."""


@dataclass(frozen=True)
class Course:
    """Settings of a training.

    Attributes:
        epochs: Largest number of passes over the facts.
        batch_size: Number of facts, and of prompts to preserve, in a step.
        learning_rate: Adam's step size.
        stop: Training ends after an epoch in which the loss of every row and every mean divergence was below this value, in nats.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    stop: float


@dataclass(frozen=True)
class Preserved:
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
    preserved: Sequence[Preserved],
    updates: Sequence[LowRankUpdate],
    course: Course,
    generator: torch.Generator,
    progress: Callable[[int, int, str], None],
) -> dict[str, object]:
    """Train updates with Adam; each step draws a batch of facts and a batch of each kind of rows to keep.

    The loss of a step is the mean of `row_losses` over the facts' rows, plus each weight times the mean over targets of KL(without the
    updates ‖ with them). The gradients of the terms are added one after another, so that memory holds one of them.

    Args:
        parts: Parts of a frozen model, with the updates attached.
        lessons: The facts.
        preserved: Rows whose distributions are preserved.
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
    pools = [(one, drawn(one.rows, generator)) for one in preserved if one.rows and one.weight]
    learned = [row for lesson in lessons for row in (lesson.plain, *lesson.others)]
    batched = packer(parts, [*learned, *(row for one, _ in pools for row in one.rows)])
    reference = Reference(parts, updates, batched)
    steps, epoch, means = 0, 0, dict[str, float]()
    for epoch in range(1, course.epochs + 1):
        worst, terms = 0.0, list[dict[str, float]]()
        order = torch.randperm(len(lessons), generator=generator).tolist()
        for chosen in chunks(order, course.batch_size):
            optimizer.zero_grad()
            rows = [row for i in chosen for row in lessons[i].drawn(generator)]
            losses = row_losses(parts, batched(rows), END_WEIGHT, ends=lessons[0].ends)[0]
            loss = losses.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            worst = max(worst, float(losses.detach().max()))
            terms.append({"facts": float(loss.detach())})
            for one, pool in pools:
                divergence = reference.divergence(list(islice(pool, min(one.batch, len(one.rows)))))
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


def row_losses(parts: Parts, batch: Padded, end_weight: float, *, ends: bool) -> tuple[Tensor, Tensor]:
    """Return the losses of rows, and each row's mean −log p over the tokens of its target without the end of text.

    The loss of a row is that mean, plus `end_weight` times −log p(end of text).

    Args:
        parts: Parts of the model.
        batch: The rows.
        end_weight: Weight of the end-of-text token.
        ends: True if the last token of every target is the end of text.

    Returns:
        Two tensors [row].
    """
    losses, owner = token_losses(parts, batch), batch.owner
    mask = torch.ones_like(owner, dtype=torch.bool)
    mask[:-1] = (owner[1:] == owner[:-1]) | (not ends)
    mask[-1:] = not ends
    sizes = torch.bincount(owner[mask], minlength=len(batch.lookup)).to(losses)
    targets = torch.zeros_like(sizes).index_add(0, owner[mask], losses[mask]) / sizes
    return (targets + end_weight * losses[~mask] if ends else targets), targets


@dataclass
class Reference:
    """Compare a model with what it gives without its updates.

    Attributes:
        parts: Parts of the model.
        updates: The updates, which are attached.
        batched: What makes a batch of rows.
        known: Row -> inputs of the output head at its targets. Logits would be many times as large.
    """

    parts: Parts
    updates: Sequence[TrainedUpdate]
    batched: Packer
    known: dict[EditRow, Tensor] = field(default_factory=dict)

    def divergence(self, rows: Sequence[EditRow]) -> Tensor:
        """Return the mean over targets of KL(without the updates ‖ with them), in nats."""
        wanted, batch = self._logits(rows), self.batched(rows)
        with logits_at(self.parts, batch.places):
            return mean_divergence(wanted, run(self.parts, batch).logits[0])

    @no_grad
    def _logits(self, rows: Sequence[EditRow]) -> Tensor:
        """Return the logits [place, vocabulary] without the updates. If all rows are known, one token is run for what follows the head."""
        new = [row for row in dict.fromkeys(rows) if row not in self.known]
        batch = self.batched(new or [_row(rows[0].tokens[:1], (0,))])

        def exchange(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states = inputs[0].reshape(-1, inputs[0].shape[-1])[batch.places]
            self.known.update(zip(new, torch.split(states, [len(row.target) for row in new]) if new else (), strict=True))
            return (torch.cat([self.known[row] for row in rows])[None], *inputs[1:])

        try:
            for update in self.updates:
                update.active = False
            with hooked(self.parts.model.get_output_embeddings(), before=exchange):
                logits: Tensor = run(self.parts, batch).logits[0]
                return logits
        finally:
            for update in self.updates:
                update.active = True


@no_grad
def target_losses(parts: Parts, lessons: Sequence[Lesson], batch_size: int) -> list[float]:
    """Return the mean −log p per token of each fact's target after its own prompt."""
    losses: list[float] = []
    for chosen in chunks(lessons, batch_size):
        batch = padded([lesson.plain for lesson in chosen], parts.model.device)
        losses += row_losses(parts, batch, 0.0, ends=chosen[0].ends)[1].tolist()
    return losses

"""Values: changes of a feed-forward output at a fact's lookup token that make the model give the target.

ROME's optimization (arXiv 2202.05262, eq. 4), for many facts at once, with steps of fixed length along the gradient. Adam changes
all coordinates equally and ends at 1.5 to 2.3 times the norm for the same probability (16 CounterFact facts on the starter base,
layer 7: 2.9 instead of 1.3 to 1.9 times the norm of the projection's output), and a large norm disturbs other text. δ is added to
the output of the projection itself, not of the block, so that norms and multipliers after the projection are part of the
optimization. Finished values are stored in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import safe_open

from workbench.edit.closed_form.lookup import Group, Lookup, rows_of, spared_rows
from workbench.edit.places.parts import EditRow, Padded, padded, row_of
from workbench.edit.places.passes import Upper, added, keys_and_values, logits_at, target_log_probabilities, upper
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.models.hooks import frozen
from workbench.weights.header import is_whole, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 8
"""Number of facts that are optimized and saved together. Each has its own δ, so it changes results by rounding only."""
PARTS = ("key", "spread", "change", "output", "numbers")
"""Tensors in the file of a value."""
KL = 0.0625
"""Weight of the divergence on each prompt that is spared, as in ROME's and MEMIT's published settings."""
_VERSION = 4
_MOMENTUM = 0.5


@dataclass(frozen=True)
class Settings:
    """Settings of the optimization. All strengths are relative, so that the same settings work for every model.

    Attributes:
        steps: Largest number of steps.
        rate: Length of a step, as a multiple of the anchor: the norm of the projection's output at the lookup token.
        clamp: Largest ‖δ‖, as a multiple of the anchor.
        confidence: A fact is done when all target tokens are the most likely ones after every context, with this mean
            probability.
        end: Whether the target ends with the end-of-text token.
        kl: Weight of KL(before ‖ after) on each prompt where predictions should not change.
    """

    steps: int
    rate: float
    clamp: float
    confidence: float
    end: bool = False
    kl: float = KL


@dataclass(frozen=True)
class Value:
    """Key and requested change of a group of facts with the same lookup token.

    Attributes:
        key: [d_in], float32: mean over facts and contexts, used in numerator and denominator of the solve.
        spread: [row, d_in]: differences of the single keys from the mean, each divided by the square root of their number.
        change: δ [d_out], float32.
        output: [d_out]: output of the projection before the edit, mean over facts and contexts.
        loss: −mean log p(target) after the plain prompt with δ, in nats per token, for the worst fact.
        before: Same as `loss`, without δ.
        top: Whether all target tokens of all facts are the most likely ones after the plain prompts.
        steps: Number of steps taken.
    """

    key: Tensor
    spread: Tensor
    change: Tensor
    output: Tensor
    loss: float
    before: float
    top: bool
    steps: int


class Values:
    """Values in the cache, read from disk when they are accessed, so that thousands of facts do not fill the memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Value:
        return _load(self.files[index])

    def __iter__(self) -> Iterator[Value]:
        return (self[i] for i in range(len(self.files)))

    def subset(self, chosen: Iterable[int]) -> Values:
        """Return the values with these numbers, in this order."""
        return Values([self.files[i] for i in chosen])

    def rows(self, part: Literal["key", "change"]) -> Tensor:
        """Return one vector of each value as rows [n, ·], float32."""
        return torch.stack([getattr(value, part) for value in self])


def values(at: Lookup, groups: Sequence[Group], settings: Settings, model_key: str, label: str = "values") -> Values:
    """Compute one key and value per group of facts at a layer, and keep them in the cache.

    Groups are optimized a few at once, and how many decides the last bits. So the division is that of all groups, whatever is in the
    cache: a call that was interrupted between two values gives the bytes of one that was not.

    Args:
        at: Where facts are looked up.
        groups: Groups of facts.
        settings: Settings of the optimization.
        model_key: Key of the model as it is now (`MethodContext.model_key`).
        label: Name in progress messages.
    """
    context = at.context
    common = [_VERSION, model_key, at.layer, at.position, list(at.contexts), asdict(settings)]

    def read(group: Group) -> list[object]:
        """Return what a value is computed from: with wide wordings their tokens, which also depend on the chat template."""
        wide = [*rows_of(at, [group], settings.end)[0], *spared_rows(at, group[:1])] if at.widely else []
        return [[[f.prompt, f.subject, f.target] for f in group], *([row.tokens, row.lookup, row.target] for row in wide)]

    keys = [json_digest([*common, *read(group)]) for group in groups]
    files = [context.cache / "values" / f"{key}.safetensors" for key in keys]
    order, start = sorted(range(len(groups)), key=lambda i: _cost(at, groups[i])), 0
    while start < len(order):
        chunk = _next_chunk(groups, order[start:])
        if missing := [i for i in chunk if not is_whole(files[i])]:
            context.progress(start, len(groups), f"{label} at layer {at.layer}")
            optimized = dict(zip(chunk, _optimize(at, [groups[i] for i in chunk], settings), strict=True))
            for i in missing:
                _save(optimized[i], files[i])
        start += len(chunk)
    context.progress(len(groups), len(groups), f"{label} at layer {at.layer}")
    return Values(files)


def _cost(at: Lookup, group: Group) -> tuple[int, int]:
    """Return what makes a group's rows dear beside others: the tokens from the lookup on, which each step runs, and the whole text."""
    rows = [row_of(fact, at.context.tokenizer, at.position) for fact in group]
    return max(len(row.tokens) - row.lookup for row in rows), len(group[0].text)


def _next_chunk(groups: Sequence[Group], order: Sequence[int]) -> list[int]:
    """Return the next groups to optimize together: at least one group, about AT_ONCE facts."""
    chunk, size = [order[0]], len(groups[order[0]])
    for i in order[1:]:
        if size + len(groups[i]) > AT_ONCE:
            break
        chunk.append(i)
        size += len(groups[i])
    return chunk


def keys_of(at: Lookup, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Return keys [group, d_in] and outputs [group, d_out] of the current model: means over facts and contexts."""
    means = []
    order = list(range(len(groups)))
    while order:
        chunk = _next_chunk(groups, order)
        order = order[len(chunk) :]
        rows, owners, _ = rows_of(at, [groups[i] for i in chunk])
        means.append(_means(keys_and_values(at.parts, at.layer, padded(rows, at.context.device)), owners, len(chunk)))
    return torch.cat([k for k, _ in means]), torch.cat([o for _, o in means])


def _means(tensors: tuple[Tensor, Tensor], owners: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the means [group, ·] of keys and outputs over each group's rows; rows after the last owner are ignored."""
    counts = torch.bincount(owners, minlength=groups)[:, None]
    first, second = (
        torch.zeros(groups, t.shape[1], device=t.device).index_add(0, owners, t[: len(owners)]) / counts for t in tensors
    )
    return first, second


def _optimize(at: Lookup, groups: Sequence[Group], settings: Settings) -> list[Value]:
    """Optimize δ for a few groups at once."""
    parts, layer, device = at.parts, at.layer, at.context.device
    rows, owners, plain = rows_of(at, groups, settings.end)
    spared = spared_rows(at, [group[0] for group in groups]) if settings.kl else []
    about = torch.arange(len(groups), device=device).repeat_interleave(len(spared) // len(groups))
    listed = [[*rows, *spared]]
    if at.widely:  # rows in many wordings differ in width, so that three batches have less than half of the padding of one
        order, cut = _by_width(rows)
        rows, owners, plain = [rows[i] for i in order], owners[order], plain[order]
        listed = [rows[:cut], rows[cut:], spared]
    batches = [padded(chosen, device) for chosen in listed if chosen]
    measured = [keys_and_values(parts, layer, batch) for batch in batches]
    measured_keys, measured_outputs = (torch.cat(tensors) for tensors in zip(*measured, strict=True))
    keys, outputs = _means((measured_keys, measured_outputs), owners, len(groups))
    spread = (measured_keys[: len(rows)] - keys[owners]) / torch.bincount(owners).sqrt()[owners, None]
    with frozen(parts.model):
        passes = [upper(parts, layer, batch) for batch in batches]
        descent = _Descent(at, passes, torch.cat([owners, about]), plain, outputs, settings).run()
    return [
        Value(
            keys[i].cpu(),
            spread[owners == i].cpu(),
            descent.change[i].cpu(),
            outputs[i].cpu(),
            float(descent.loss[i]),
            float(descent.before[i]),
            bool(descent.top[i]),
            int(descent.steps[i]),
        )
        for i in range(len(groups))
    ]


def _by_width(rows: Sequence[EditRow]) -> tuple[list[int], int]:
    """Return the numbers of rows with the narrowest from the lookup on first, and how many make one batch when the rest makes another."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens) - rows[i].lookup)
    widths = [len(rows[i].tokens) - rows[i].lookup for i in order]
    return order, min(range(1, len(rows) + 1), key=lambda cut: cut * widths[cut - 1] + (len(rows) - cut) * widths[-1])


@dataclass(frozen=True)
class _Optimum:
    """Results of a descent, per group: δ [group, d_out], steps taken, loss without and with δ, and `top` (see `Value`)."""

    change: Tensor
    steps: Tensor
    before: Tensor
    loss: Tensor
    top: Tensor


class _Descent:
    """Gradient descent on δ of several groups; each group stops on its own, and its rows are not run any more.

    Args:
        at: Where δ is added.
        passes: Rows of the groups' facts, followed by those of prompts to spare; together or apart.
        owner: [row], index of the group.
        plain: [row of a fact], whether it is a fact's prompt alone.
        outputs: [group, d_out], the outputs without δ, whose norms are what strengths are relative to.
        settings: Settings of the optimization.
    """

    def __init__(
        self, at: Lookup, passes: Sequence[Upper], owner: Tensor, plain: Tensor, outputs: Tensor, settings: Settings
    ) -> None:
        self.parts, self.layer, self.passes, self.owner, self.plain = at.parts, at.layer, passes, owner, plain
        self.rows, self.outputs, self.settings = len(plain), outputs, settings
        self.groups, anchor = len(outputs), outputs.norm(dim=1)
        self.radius, self.step = settings.clamp * anchor, settings.rate * anchor[:, None]

    def run(self) -> _Optimum:
        """Descend until all groups are done or the steps are used up."""
        change = torch.zeros_like(self.outputs, requires_grad=True)
        velocity, steps = torch.zeros_like(change), torch.zeros_like(self.radius)
        done = torch.zeros_like(self.radius, dtype=torch.bool)
        before: Tensor | None = None
        reference = best = loss = top = torch.zeros(0)
        for step in range(self.settings.steps + 1):
            logits, batch, spared = self._logits(change)
            mean, right = target_log_probabilities(logits, batch, self.rows)
            step_loss, step_top = self._worst_loss(-mean.detach(), right)
            if before is None:
                before, loss, top, best = step_loss, step_loss, step_top, change.detach().clone()
                reference = spared.detach().float().log_softmax(-1)
            loss, top = torch.where(done, loss, step_loss), torch.where(done, top, step_top)
            best = torch.where(done[:, None], best, change.detach())
            probability = mean.detach()
            wrong = torch.zeros(self.groups, device=probability.device).index_add(0, self.owner[: self.rows], (~right).float())
            ended = ((wrong == 0) & (self._mean(probability.exp()) >= self.settings.confidence)) & ~done
            done = done | ended
            if step == self.settings.steps or bool(done.all()):
                break
            total = self._mean(-mean).sum() + self._divergence(spared, reference)
            if not total.requires_grad:  # reversible layers (Reformer) recompute their inputs outside of this graph
                raise WorkbenchError(
                    f"layer {self.layer}: the loss has no gradient at the feed-forward output, because the model's layers hide it",
                    "Teach the facts with `edit: finetune` or `edit: memory`.",
                )
            (gradient,) = torch.autograd.grad(total, change)
            steps += (~done).float()
            with torch.no_grad():
                velocity.mul_(_MOMENTUM).add_(gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12), alpha=1 - _MOMENTUM)
                change.sub_(self.step * velocity)
                length = change.norm(dim=1)
                change.mul_((self.radius / length.clamp(min=1e-12)).clamp(max=1.0)[:, None])
            if bool(ended.any()):
                reference = self._leave_out(done, reference)
        assert before is not None
        return _Optimum(best, steps, before, loss, top)

    def _logits(self, change: Tensor) -> tuple[Tensor, Padded, Tensor]:
        """Return the logits [1, place, vocabulary] at all targets of facts, these places, and the logits [prompt, ·] at the ends of spared ones."""
        logits, spared, targets, owners, first = [], [], [], [], 0
        for passes in self.passes:
            batch, rows = passes.batch, slice(first, first + len(passes.batch.lookup))
            with added(self.parts, self.layer, batch, change, self.owner[rows]), logits_at(self.parts, batch.places):
                found = passes.run().logits
            of_facts = batch.owner + first < self.rows
            logits.append(found[:, of_facts])
            spared.append(found[0, ~of_facts])
            targets.append(batch.targets[of_facts])
            owners.append(batch.owner[of_facts] + first)
            first = rows.stop
        places = replace(self.passes[0].batch, targets=torch.cat(targets), owner=torch.cat(owners))
        return torch.cat(logits, 1), places, torch.cat(spared)

    def _leave_out(self, done: Tensor, reference: Tensor) -> Tensor:
        """Leave out the rows of groups that are done; return the reference of the other prompts to spare."""
        going = ~done[self.owner]
        left = reference[going[self.rows :]] if len(reference) else reference
        for passes, own in zip(
            self.passes, torch.split(going, [len(passes.batch.lookup) for passes in self.passes]), strict=True
        ):
            passes.keep_rows(own.nonzero()[:, 0])
        self.passes = [passes for passes in self.passes if len(passes.batch.lookup)]
        self.plain = self.plain[going[: self.rows]]
        self.rows = len(self.plain)
        self.owner = self.owner[going]
        return left

    def _divergence(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Return the weighted divergence on the prompts to spare, summed over them; zero without such rows."""
        if not len(reference):
            return torch.zeros((), device=logits.device)
        log_probabilities = logits.float().log_softmax(-1)
        divergence = torch.nn.functional.kl_div(log_probabilities, reference, reduction="sum", log_target=True)
        return self.settings.kl * divergence

    def _mean(self, rows: Tensor) -> Tensor:
        """Return the mean over the rows of each group; 0 for one without rows, which is done."""
        owner = self.owner[: self.rows]
        counts = torch.bincount(owner, minlength=self.groups).clamp(min=1)
        return torch.zeros(self.groups, device=rows.device).index_add(0, owner, rows) / counts

    def _worst_loss(self, loss: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return each group's largest loss over plain prompts, and whether all its targets are the most likely tokens."""
        owner = self.owner[: self.rows][self.plain]
        worst = torch.full((self.groups,), -torch.inf, device=loss.device).scatter_reduce(0, owner, loss[self.plain], "amax")
        wrong = torch.zeros(self.groups, device=loss.device).index_add(0, owner, (~right[self.plain]).float())
        return worst, wrong == 0


def _save(value: Value, file: Path) -> None:
    numbers = torch.tensor([value.loss, value.before, float(value.top), float(value.steps)], dtype=torch.float64)
    save_tensors(
        {"key": value.key, "spread": value.spread, "change": value.change, "output": value.output, "numbers": numbers}, file
    )


def _load(file: Path) -> Value:
    with safe_open(file, "pt") as stored:
        key, spread, change, output, numbers = (stored.get_tensor(n) for n in PARTS)
    loss, before, top, steps = numbers.tolist()
    return Value(key, spread, change, output, loss, before, bool(top), int(steps))

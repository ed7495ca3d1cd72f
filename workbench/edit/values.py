"""Values: the change of a feed-forward output at a fact's lookup that makes the model say the target.

ROME's optimisation (2202.05262, eq. 4) for many facts at once. δ is added to the output projection itself, not to the block's
output, so that norms and multipliers behind the projection are part of what is optimised. Finished values are kept in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import kl_div

from workbench.edit.parts import Parts
from workbench.edit.passes import added, from_layer, keys_and_values, logits_at, run, target_log_probabilities
from workbench.edit.rows import Padded, Position, Row, padded, row_of, vocabulary_key
from workbench.facts import Fact
from workbench.registry import MethodContext
from workbench.weights.digests import json_digest

AT_ONCE = 8
"""Facts that are optimised together; the saved unit. Each has its own δ, so the number does not change results beyond rounding."""
_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """How values are optimised. All strengths are relative, so that one set serves every model.

    Attributes:
        steps: At most.
        rate: Length of Adam's first steps, as a share of the largest allowed ‖δ‖.
        clamp: Largest ‖δ‖, as a multiple of the anchor: the typical norm of the projection's output at lookups.
        kl: Weight of KL(before ‖ after) on "{subject} is a".
        decay: Weight of (‖δ‖ / anchor)².
        confidence: A fact is done when every context has all target tokens on top, with this mean probability.
    """

    steps: int
    rate: float
    clamp: float
    kl: float
    decay: float
    confidence: float


@dataclass(frozen=True)
class Value:
    """One fact's key and wanted change.

    Attributes:
        key: [d_in], mean over contexts, float32: the one that numerator and denominator of the solve share.
        change: δ [d_out], float32.
        output: [d_out], what the projection gave before, mean over contexts.
        loss: −mean log p(target) of the plain prompt with δ, nats a token.
        before: The same without δ.
        top: Whether every target token is on top there.
        steps: Taken.
    """

    key: Tensor
    change: Tensor
    output: Tensor
    loss: float
    before: float
    top: bool
    steps: int


def values(
    context: MethodContext, parts: Parts, layer: int, facts: Sequence[Fact], position: Position, contexts: Sequence[str],
    settings: Settings, weights_key: str, what: str = "values",
) -> list[Value]:  # fmt: skip
    """Keys and values of facts at one layer, in the order of the facts. What the cache has is not optimised again.

    Args:
        context: Model, tokenizer, cache, progress.
        parts: Where it writes.
        layer: The layer.
        facts: The facts.
        position: Where facts are looked up.
        contexts: Texts in front of prompts; the prompt alone always comes first.
        settings: Of the optimisation.
        weights_key: Digest of the weights that the model has now.
        what: How progress calls it.
    """
    common = [_VERSION, weights_key, layer, position, list(contexts), asdict(settings), vocabulary_key(context)]
    files = [context.cache / "values" / f"{json_digest([*common, f.prompt, f.subject, f.target])}.safetensors" for f in facts]
    order = sorted((i for i, file in enumerate(files) if not file.is_file()), key=lambda i: len(facts[i].text))
    done = len(facts) - len(order)
    for start in range(0, len(order), AT_ONCE):
        chunk = order[start : start + AT_ONCE]
        context.progress(done + start, len(facts), f"{what} at layer {layer}")
        for i, value in zip(
            chunk, _optimise(context, parts, layer, [facts[i] for i in chunk], position, contexts, settings), strict=True
        ):
            _save(value, files[i])
    context.progress(len(facts), len(facts), f"{what} at layer {layer}")
    return [_load(file) for file in files]


def keys_of(
    context: MethodContext, parts: Parts, layer: int, facts: Sequence[Fact], position: Position, contexts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Keys [fact, d_in] and outputs [fact, d_out] of the model as it is, means over the contexts."""
    found = []
    for start in range(0, len(facts), AT_ONCE):
        part = facts[start : start + AT_ONCE]
        rows = [row_of(f, context.tokenizer, position, before) for f in part for before in ("", *contexts)]
        keys, outputs = keys_and_values(parts, layer, padded(rows, context.device))
        shape = (len(part), len(contexts) + 1, -1)
        found.append((keys.reshape(shape).mean(1), outputs.reshape(shape).mean(1)))
    return torch.cat([k for k, _ in found]), torch.cat([o for _, o in found])


def anchor_of(outputs: Tensor) -> Tensor:
    """The typical norm of an output at lookups: the median over contexts and facts."""
    found: Tensor = outputs.norm(dim=-1).median()
    return found


def _optimise(
    context: MethodContext,
    parts: Parts,
    layer: int,
    facts: Sequence[Fact],
    position: Position,
    contexts: Sequence[str],
    settings: Settings,
) -> list[Value]:
    """δ for a few facts at once, by Adam."""
    each = len(contexts) + 1
    rows = [row_of(f, context.tokenizer, position, before) for f in facts for before in ("", *contexts)]
    owner = torch.arange(len(facts), device=context.device).repeat_interleave(each)
    essence = _essence(facts, context, position) if settings.kl else []
    batch = padded([*rows, *essence], context.device)
    whose = torch.cat([owner, torch.arange(len(facts), device=context.device)]) if essence else owner
    keys, outputs = keys_and_values(parts, layer, batch)
    anchor = outputs[: len(rows)].norm(dim=1).reshape(len(facts), each).mean(1)
    parameters = list(parts.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with from_layer(parts, layer, batch), logits_at(parts, _places(batch, len(rows))):
            change, steps, losses = _descend(parts, layer, batch, whose, len(rows), each, anchor, settings)
    finally:
        for p in trained:
            p.requires_grad_(True)
    first, last, top = losses
    shape = (len(facts), each, -1)
    keys, outputs = (t[: len(rows)].reshape(shape).mean(1).cpu() for t in (keys, outputs))
    return [
        Value(keys[i], change[i].cpu(), outputs[i], float(last[i]), float(first[i]), bool(top[i]), int(steps[i]))
        for i in range(len(facts))
    ]


def _essence(facts: Sequence[Fact], context: MethodContext, position: Position) -> list[Row]:
    """Rows of "{subject} is a": what the subject is must not change. Without a subject, or where facts are looked up at the prompt's
    last token, the key is another one and nothing would be changed there."""
    if position != "subject_last" or any(f.subject is None for f in facts):
        return []
    return [row_of(Fact(f.id, "{subject} is a", f.subject, "thing", place=f.place), context.tokenizer, position) for f in facts]


def _places(batch: Padded, rows: int) -> Tensor:
    """Places that predict targets; of the rows behind the first `rows` only the prompt's last."""
    keep = batch.owner < rows
    width = batch.tokens.shape[1]
    last = [int(batch.mask[i].sum()) for i in range(rows, len(batch.lookup))]
    ends = [batch.places[(batch.owner == rows + j).nonzero()[0, 0]] for j in range(len(last))]
    assert all(int(e) < (rows + j + 1) * width for j, e in enumerate(ends))
    return torch.cat([batch.places[keep], torch.stack(ends)]) if ends else batch.places[keep]


def _descend(
    parts: Parts, layer: int, batch: Padded, whose: Tensor, rows: int, each: int, anchor: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Adam on δ; returns δ, steps taken, and (loss before, loss after, all tokens on top) of the plain prompts."""
    facts = len(anchor)
    radius = settings.clamp * anchor
    width = _output_width(parts, layer)
    change = torch.zeros(facts, width, device=anchor.device, requires_grad=True)
    # Adam moves every coordinate by about its rate: √d of them make the step's length.
    unit = radius[:, None] / width**0.5
    optimizer = torch.optim.Adam([change], lr=settings.rate)
    taken = torch.zeros(facts, device=anchor.device)
    first = best_loss = None
    kept = torch.zeros_like(change)
    reference: Tensor | None = None
    targets = batch.owner < rows
    narrow = Padded(batch.tokens, batch.mask, batch.lookup, batch.places[targets], batch.wanted[targets], batch.owner[targets])
    done = torch.zeros(facts, dtype=torch.bool, device=anchor.device)
    for step in range(settings.steps + 1):
        with added(parts, layer, batch, change * unit, whose):
            logits = run(parts, batch).logits
        count = len(narrow.places)
        mean, top = target_log_probabilities(logits[:, :count], narrow, rows)
        loss = -mean.reshape(facts, each).mean(1)
        if step == 0:
            first = -mean.detach().reshape(facts, each)[:, 0]
            reference = logits[0, count:].detach().float().log_softmax(-1)
        sure = top.reshape(facts, each).all(1) & (mean.detach().reshape(facts, each).exp().mean(1) >= settings.confidence)
        newly = sure & ~done
        state = (mean.detach().reshape(facts, each)[:, 0].neg(), top.reshape(facts, each)[:, 0])
        best_loss = (
            state if best_loss is None else (torch.where(done, best_loss[0], state[0]), torch.where(done, best_loss[1], state[1]))
        )
        kept = torch.where(done[:, None], kept, change.detach())
        done |= newly
        if step == settings.steps or bool(done.all()):
            break
        total = loss + settings.decay * (change * unit).norm(dim=1).pow(2) / anchor.pow(2)
        if reference is not None and len(reference):
            now = logits[0, count:].float().log_softmax(-1)
            total = total + settings.kl * kl_div(now, reference, reduction="none", log_target=True).sum(1)
        (gradient,) = torch.autograd.grad(total.sum(), change)
        change.grad = gradient
        optimizer.step()
        taken += (~done).float()
        with torch.no_grad():
            length = (change * unit).norm(dim=1, keepdim=True)
            change.mul_((radius[:, None] / length.clamp(min=1e-12)).clamp(max=1.0))
    assert first is not None
    assert best_loss is not None
    return kept * unit, taken, (first, *best_loss)


def _output_width(parts: Parts, layer: int) -> int:
    weight = parts.out(layer).weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1] if parts.transposed else weight.shape[0])


def _save(value: Value, file: Path) -> None:
    numbers = torch.tensor([value.loss, value.before, float(value.top), float(value.steps)], dtype=torch.float64)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file({"key": value.key, "change": value.change, "output": value.output, "numbers": numbers}, partial)
    partial.rename(file)


def _load(file: Path) -> Value:
    with safe_open(file, "pt") as stored:
        key, change, output, numbers = (stored.get_tensor(n) for n in ("key", "change", "output", "numbers"))
    loss, before, top, steps = numbers.tolist()
    return Value(key, change, output, loss, before, bool(top), int(steps))

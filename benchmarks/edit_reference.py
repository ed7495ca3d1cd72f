"""ROME and MEMIT as their papers state them, one fact after the other: the peer of `edit.py`.

Written from the formulas alone (Meng et al. 2022, ROME, eq. 2 and 4; Meng et al. 2023, MEMIT, eq. 14), without anything that saves work: every
optimization step runs one fact's prompts through the whole model and computes logits at every position, keys are read in a pass through
all layers, and each fact is a system of the projection's whole width. The objective, its contexts and its stop are those of the workbench
(`workbench.edit.closed_form.values.Settings`), so that both sides look for the same values, and what differs is the way there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from workbench.edit.closed_form.values import Settings
from workbench.edit.places.parts import EditRow, Padded, Parts, padded, row_of
from workbench.facts.facts import Fact
from workbench.models.hooks import hooked
from workbench.steps import MethodContext


@dataclass(frozen=True)
class PeerValue:
    """Key k [d_in] and value change δ [d_out] of one fact, the number of steps, and whether its target is the most likely answer."""

    key: Tensor
    change: Tensor
    steps: int
    top: bool


def value_of(
    context: MethodContext, parts: Parts, layer: int, fact: Fact, before: Sequence[str], settings: Settings
) -> PeerValue:
    """Optimize δ with Adam, added to the projection's output at the subject's last token (ROME, eq. 4)."""
    rows = [row_of(fact, context.tokenizer, "subject_last", text) for text in ("", *before)]
    essence = row_of(Fact(fact.id, "{subject} is a", fact.subject, "thing", place=fact.place), context.tokenizer, "subject_last")
    batch = padded([*rows, essence], context.device)
    keys, outputs = _read(parts, layer, batch)
    key, anchor = keys[: len(rows)].mean(0), outputs[: len(rows)].mean(0).norm()
    radius = settings.clamp * anchor
    unit = radius / outputs.shape[1] ** 0.5
    change = torch.zeros(outputs.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=settings.rate)
    reference: Tensor | None = None
    top = False
    step = 0
    for step in range(settings.steps + 1):
        logits = _run(parts, layer, batch, change * unit)
        mean, right = _targets(logits, rows)
        now = logits[len(rows), essence.start].log_softmax(-1)
        reference = now.detach() if reference is None else reference
        top = bool(right[0])
        if step == settings.steps or (bool(right.all()) and float(mean.detach().exp().mean()) >= settings.confidence):
            break
        loss = -mean.mean() + settings.kl * kl_div(now, reference, reduction="sum", log_target=True)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            change.mul_((radius / (change * unit).norm().clamp(min=1e-12)).clamp(max=1.0))
    return PeerValue(key, (change * unit).detach(), step, top)


def rome(moments: Tensor, value: PeerValue) -> Tensor:
    """Return ΔW [d_out, d_in] = δ (C⁻¹k)ᵀ / kᵀC⁻¹k (ROME, eq. 2), by a system of the width of C [d_in, d_in]."""
    through: Tensor = torch.linalg.solve(moments, value.key.double())
    return value.change.double()[:, None] * through / (through @ value.key.double())


def memit(moments: Tensor, values: Sequence[PeerValue], weight: float) -> Tensor:
    """Return ΔW [d_out, d_in] = R Kᵀ (λC + KKᵀ)⁻¹ (MEMIT, eq. 14) of one or more facts."""
    keys = torch.stack([f.key for f in values], 1).double()
    changes = torch.stack([f.change for f in values], 1).double()
    solved: Tensor = torch.linalg.solve(weight * moments + keys @ keys.T, keys)
    return changes @ solved.T


@torch.no_grad()
def _read(parts: Parts, layer: int, batch: Padded) -> tuple[Tensor, Tensor]:
    """Return input and output of the projection at the subject, from a pass through all layers."""
    captured: list[Tensor] = []
    with hooked(parts.out(layer), after=lambda _m, args, out: captured.extend((args[0], out))):
        parts.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    rows = torch.arange(len(batch.lookup))
    return captured[0][rows, batch.lookup].float(), captured[1][rows, batch.lookup].float()


def _run(parts: Parts, layer: int, batch: Padded, shift: Tensor) -> Tensor:
    """Return logits [row, position, vocabulary] with `shift` added at the subject's last token."""
    rows = torch.arange(len(batch.lookup))

    def add(_module: object, _args: object, output: Tensor) -> Tensor:
        shifted = output.clone()
        shifted[rows, batch.lookup] = shifted[rows, batch.lookup] + shift
        return shifted

    with hooked(parts.out(layer), after=add):
        logits: Tensor = parts.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
    return logits


def _targets(logits: Tensor, rows: Sequence[EditRow]) -> tuple[Tensor, Tensor]:
    """Return the mean log-probability of the target's tokens [row], and whether all of them are the most likely ones [row]."""
    means, right = [], []
    for i, row in enumerate(rows):
        scores = logits[i, row.start : row.start + len(row.target)].log_softmax(-1)
        target = torch.tensor(row.target)
        means.append(scores.gather(1, target[:, None]).mean())
        right.append((scores.argmax(-1) == target).all())
    return torch.stack(means), torch.stack(right)

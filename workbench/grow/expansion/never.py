"""Rows of a router that no token of some texts takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.grow.mixtures.gates import Gates, keep_gates, kept_gates, live_modules, read_inputs
from workbench.models.layout import Model
from workbench.models.texts import TextRow
from workbench.steps import GrowContext

STRENGTH = 10.0
"""The logit of a token that points where the mean does is minus this, if nothing asks for more or less."""


@torch.no_grad()
def never_gates(
    context: GrowContext,
    rows: Sequence[TextRow],
    routers: Mapping[str, Tensor],
    corrections: Mapping[str, Tensor],
    model: Model,
    top_k: int,
) -> Gates:
    """One row a layer, -c m / (|m| s): m the mean of what the router reads, s the mean norm, c chosen so that no token takes the expert.

    Args:
        rows: Texts to read: two passes.
        routers: Router's tensor -> its rows so far, [experts, hidden].
        corrections: Router's tensor -> what is added to the softmax of the logits before the choice, [experts]; none: logits decide.
        model: With these routers.
        top_k: How many experts a token takes.

    Returns:
        Router's tensor -> [1, hidden]; the record says how many tokens take the new expert, 0.

    Errors: a layer where no c does: some tokens point away from the mean, and others nowhere near an expert.
    """
    if (kept := kept_gates(context)) is not None:
        return kept
    live, place = context.live({}), live_modules(model, routers)
    total, norms, tokens = (
        {name: torch.zeros(w.shape[1], dtype=torch.float64) for name, w in routers.items()},
        dict.fromkeys(routers, 0.0),
        0,
    )
    context.progress(0, 2, "the mean of what the router reads")
    for inputs in read_inputs(live, place, rows, context.device):
        for name, x in inputs.items():
            total[name] += x.sum(0).double().cpu()
            norms[name] += float(x.norm(dim=1).sum())
        tokens += len(next(iter(inputs.values())))
    unit = {name: (torch.nn.functional.normalize(t, dim=0) / (norms[name] / tokens)).float() for name, t in total.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in routers}
    context.progress(1, 2, "tokens that would take a new expert")
    for inputs in read_inputs(live, place, rows, context.device):
        for name, x in inputs.items():
            logits[name].append((x @ torch.cat([routers[name], unit[name][None]]).to(x.device).T).cpu())
    strengths, found = {}, {}
    for name, parts in logits.items():
        values = torch.cat(parts)
        strengths[name] = _strength(values[:, :-1].topk(top_k).values[:, -1], values[:, -1])
        values[:, -1] *= -strengths[name]
        if name in corrections:
            values = values.softmax(1) + torch.nn.functional.pad(corrections[name], (0, 1))
        taken = int((values.topk(top_k).indices == values.shape[1] - 1).any(1).sum())
        if taken:
            raise WorkbenchError(
                f"gate: never: {taken} of {tokens} tokens take the new expert all the same ({name}): they point away from the mean of what "
                "the router reads",
                "Other texts, or `gate: prompts` or `gate: random`.",
                2,
            )
        found[name] = -strengths[name] * unit[name][None]
    context.progress(2, 2, "routers")
    record = {"tokens": tokens, "selected": 0, "strength": [round(v, 3) for v in strengths.values()]}
    return keep_gates(context, found, record)


def _strength(threshold: Tensor, along: Tensor) -> float:
    """The c for which -c `along` stays below `threshold` for every token, as near to `STRENGTH` as the middle of what does allows.

    Args:
        threshold: [tokens], the lowest logit among the experts that a token takes.
        along: [tokens], the logit that the mean's direction itself would have.
    """
    with_mean, away = along > 0, along < 0
    low = max(0.0, float((-threshold / along)[with_mean].max())) if with_mean.any() else 0.0
    high = float((threshold / -along)[away].min()) if away.any() else float("inf")
    return min(max(2 * low, STRENGTH), (low + high) / 2) if high > low else STRENGTH

"""Rows of a router that select the new expert for no token of some texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workbench.errors import InvalidRecipeError
from workbench.grow.mixtures.gates import Gates, keep_gates, kept_gates, live_modules, read_inputs
from workbench.models.layout import Model
from workbench.models.texts import TextRow
from workbench.steps import GrowContext

STRENGTH = 10.0
"""Default negative logit of the new expert, for a token in the direction of the mean."""


@torch.no_grad()
def never_gates(
    context: GrowContext,
    rows: Sequence[TextRow],
    routers: Mapping[str, Tensor],
    corrections: Mapping[str, Tensor],
    model: Model,
    top_k: int,
) -> Gates:
    """Return a router row per layer, -c m / (|m| s), with which no token selects the new expert.

    m is the mean of the router's inputs, s their mean norm, and c is chosen so that no token selects the expert.

    Args:
        context: Live model, cache and progress.
        rows: Texts as tokens, read in two passes.
        routers: Router's tensor name -> its current rows [experts, hidden].
        corrections: Router's tensor name -> bias [experts] that is added to the softmax before the selection; a router without
            one selects by logits.
        model: Model with these routers.
        top_k: Number of experts that the router selects for each token.

    Returns:
        Router's tensor name -> [1, hidden]; the record states the number of tokens that select the new expert, 0.

    Raises:
        WorkbenchError: If no c works in a layer, because tokens point away from the mean.
    """
    if (cached := kept_gates(context)) is not None:
        return cached
    live, place = context.live({}), live_modules(model, routers)
    total, norms, tokens = (
        {name: torch.zeros(w.shape[1], dtype=torch.float64) for name, w in routers.items()},
        dict.fromkeys(routers, 0.0),
        0,
    )
    context.progress(0, 2, "mean of the router's inputs")
    for inputs in read_inputs(live, place, rows, context.device):
        for name, x in inputs.items():
            total[name] += x.sum(0).double().cpu()
            norms[name] += float(x.norm(dim=1).sum())
        tokens += len(next(iter(inputs.values())))
    unit = {name: (torch.nn.functional.normalize(t, dim=0) / (norms[name] / tokens)).float() for name, t in total.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in routers}
    context.progress(1, 2, "tokens that would select the new expert")
    for inputs in read_inputs(live, place, rows, context.device):
        for name, x in inputs.items():
            logits[name].append((x @ torch.cat([routers[name], unit[name][None]]).to(x.device).T).cpu())
    strengths, new_rows = {}, {}
    for name, parts in logits.items():
        values = torch.cat(parts)
        strengths[name] = _strength(values[:, :-1].topk(top_k).values[:, -1], values[:, -1])
        values[:, -1] *= -strengths[name]
        if name in corrections:
            values = values.softmax(1) + torch.nn.functional.pad(corrections[name], (0, 1))
        selected = int((values.topk(top_k).indices == values.shape[1] - 1).any(1).sum())
        if selected:
            raise InvalidRecipeError(
                f"gate: never: {selected} of {tokens} tokens still select the new expert ({name}): they point against the mean input "
                "of the router",
                "Use other texts, `gate: prompts` or `gate: random`.",
            )
        new_rows[name] = -strengths[name] * unit[name][None]
    context.progress(2, 2, "routers")
    record = {"tokens": tokens, "selected": 0, "strength": [round(v, 3) for v in strengths.values()]}
    return keep_gates(context, new_rows, record)


def _strength(threshold: Tensor, along: Tensor) -> float:
    """Return a c for which -c `along` stays below `threshold` for every token, close to `STRENGTH` if the valid range allows.

    Args:
        threshold: [tokens], the lowest logit among the experts that a token selects.
        along: [tokens], the logit of a row in the direction of the mean.
    """
    with_mean, away = along > 0, along < 0
    low = max(0.0, float((-threshold / along)[with_mean].max())) if with_mean.any() else 0.0
    high = float((threshold / -along)[away].min()) if away.any() else float("inf")
    return min(max(2 * low, STRENGTH), (low + high) / 2) if high > low else STRENGTH

"""Rows of a router that select the new expert for no token of some texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError
from workbench.grow.mixtures.gates import Gates, live_modules, load_gates, read_inputs, save_gates
from workbench.lazy import no_grad, torch
from workbench.models.layout import Model
from workbench.models.texts import TextRow
from workbench.steps import GrowContext

if TYPE_CHECKING:
    from torch import Tensor

STRENGTH = 10.0
"""Default negative logit of the new expert, for a token in the direction of the mean."""


@no_grad
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
    if (cached := load_gates(context)) is not None:
        return cached
    live, modules = context.live({}), live_modules(model, routers)
    sums = {name: torch.zeros(w.shape[1], dtype=torch.float64) for name, w in routers.items()}
    norms = dict.fromkeys(routers, 0.0)
    tokens = 0
    context.progress(0, 2, "mean of the router's inputs")
    for inputs in read_inputs(live, modules, rows, context.device):
        for name, x in inputs.items():
            sums[name] += x.sum(0).double().cpu()
            norms[name] += float(x.norm(dim=1).sum())
        tokens += len(next(iter(inputs.values())))
    # m / (|m| s), the new row for c = -1
    direction = {name: (torch.nn.functional.normalize(t, dim=0) / (norms[name] / tokens)).float() for name, t in sums.items()}
    batch_scores: dict[str, list[Tensor]] = {name: [] for name in routers}
    context.progress(1, 2, "tokens that would select the new expert")
    for inputs in read_inputs(live, modules, rows, context.device):
        for name, x in inputs.items():
            batch_scores[name].append((x @ torch.cat([routers[name], direction[name][None]]).to(x.device).T).cpu())
    strengths, new_rows = {}, {}
    for name, parts in batch_scores.items():
        scores = torch.cat(parts)  # [tokens, experts + 1], the new expert last
        lowest_selected = scores[:, :-1].topk(top_k).values[:, -1]
        strengths[name] = _strength(lowest_selected, scores[:, -1])
        scores[:, -1] *= -strengths[name]
        if name in corrections:
            scores = scores.softmax(1) + torch.nn.functional.pad(corrections[name], (0, 1))
        selected = int((scores.topk(top_k).indices == scores.shape[1] - 1).any(1).sum())
        if selected:
            raise WorkbenchError(
                f"gate: never: {selected} of {tokens} tokens still select the new expert ({name}): they point against the mean input "
                "of the router",
                "Use other texts, `gate: prompts` or `gate: random`.",
                2,
            )
        new_rows[name] = -strengths[name] * direction[name][None]
    context.progress(2, 2, "routers")
    record = {"tokens": tokens, "selected": 0, "strength": [round(v, 3) for v in strengths.values()]}
    return save_gates(context, new_rows, record)


def _strength(threshold: Tensor, along: Tensor) -> float:
    """Return a c for which -c `along` stays below `threshold` for every token, close to `STRENGTH` if the valid range allows.

    Args:
        threshold: [tokens], the lowest logit among the experts that a token selects.
        along: [tokens], the logit of a row in the direction of the mean.
    """
    with_mean, against_mean = along > 0, along < 0
    low = max(0.0, float((-threshold / along)[with_mean].max())) if with_mean.any() else 0.0
    high = float((threshold / -along)[against_mean].min()) if against_mean.any() else float("inf")
    return min(max(2 * low, STRENGTH), (low + high) / 2) if high > low else STRENGTH

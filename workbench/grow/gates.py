"""Routers solved from texts: which expert a token belongs to, by ridge regression on what the router itself reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.conversion import live_names
from workbench.layout import Model
from workbench.merge.calibration import Row, batches
from workbench.registry import GrowContext, Grown
from workbench.weights.digests import read_json, write_json

HELD_OUT = 5
"""Every fifth text is not solved on."""


@dataclass(frozen=True)
class Gates:
    """Routers.

    Attributes:
        rows: Router's tensor name -> [experts, hidden].
        record: Tokens solved on, and the share of held-out tokens for which the router puts the right expert first: of each expert, the
            mean over layers, and of each layer, the mean over experts.
    """

    rows: dict[str, Tensor]
    record: dict[str, Any]


@dataclass
class _Moments:
    """Of one layer's inputs on one expert's texts: Σ x xᵀ, Σ x, their number, and held-out inputs."""

    gram: Tensor
    total: Tensor
    count: int
    held: list[Tensor]


def ridge_gates(
    context: GrowContext, rows: Mapping[str, Sequence[Row]], changes: Mapping[str, Mapping[str, Grown]], readers: Mapping[str, str],
    model: Model, ridge: float, temperature: float,
) -> Gates:  # fmt: skip
    """Solve every layer's router: W = Y' X (Σ over experts of mean x x' + λ I)^-1 / temperature, Y one-hot (DUME, arXiv 2603.29765).

    Each expert's texts go through the model with that expert's feed-forward layers, so that the inputs are those of a router that routes
    as it should. Experts count alike, however many tokens they have.

    Args:
        rows: Expert -> its texts, in the router's order.
        changes: Expert -> its tensors in the model before growth.
        readers: Dense matrix that reads what the router will read -> name of the router's rows.
        model: Before growth.
        ridge: λ, relative to the mean of the diagonal.
    """
    known = read_json(context.cache.with_suffix(".json")) if context.cache.is_file() else None
    if known is not None:
        return Gates(load_file(context.cache), known)
    place = {reader: live_names(model.config, model.weights.specs)[reader][0].removesuffix(".weight") for reader in readers}
    found: dict[str, dict[str, _Moments]] = {}
    for number, (expert, texts) in enumerate(rows.items()):
        context.progress(number, len(rows), f"{expert or 'anchor'}: what the router reads")
        found[expert] = _moments(context, changes[expert], texts, place)
    solved = {reader: _solve([found[e][reader] for e in rows], ridge) / temperature for reader in readers}
    hits = {reader: [_hit(solved[reader], found[e][reader].held, i) for i, e in enumerate(rows)] for reader in readers}
    record = {
        "tokens": {e or "anchor": next(iter(found[e].values())).count for e in rows},
        "found": {e or "anchor": round(sum(h[i] for h in hits.values()) / len(hits), 4) for i, e in enumerate(rows)},
        "found_by_layer": [round(sum(h) / len(h), 4) for h in hits.values()],
    }
    gates = {readers[reader]: w.float().cpu().contiguous() for reader, w in solved.items()}
    context.cache.parent.mkdir(parents=True, exist_ok=True)
    save_file(gates, context.cache)
    write_json(context.cache.with_suffix(".json"), record)
    context.progress(len(rows), len(rows), "routers")
    return Gates(gates, record)


@torch.no_grad()
def _moments(
    context: GrowContext, changes: Mapping[str, Grown], texts: Sequence[Row], place: Mapping[str, str]
) -> dict[str, _Moments]:
    """One expert's moments, layer by layer, in one pass over its texts."""
    live = context.live(changes)
    sizes = {reader: live.get_submodule(module).weight.shape[1] for reader, module in place.items()}
    found = {
        r: _Moments(torch.zeros(d, d, device=context.device), torch.zeros(d, device=context.device), 0, [])
        for r, d in sizes.items()
    }
    halves = ([r for i, r in enumerate(texts) if i % HELD_OUT], [r for i, r in enumerate(texts) if not i % HELD_OUT])
    for held, half in enumerate(halves):
        for batch in batches(half, context.device):
            with _reading(live, place) as seen:
                live(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
            for reader, inputs in seen.items():
                x = inputs.reshape(-1, inputs.shape[-1])[batch.mask.flatten().bool()].float()
                moments = found[reader]
                if held:
                    moments.held.append(x.cpu())
                else:
                    moments.gram += x.T @ x
                    moments.total += x.sum(0)
                    moments.count += len(x)
    return found


@contextmanager
def _reading(live: Any, place: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """What modules read while this is open."""
    seen: dict[str, Tensor] = {}

    def see(reader: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            seen[reader] = args[0]

        return hook

    hooks = [live.get_submodule(module).register_forward_pre_hook(see(reader)) for reader, module in place.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _solve(moments: Sequence[_Moments], ridge: float) -> Tensor:
    """[experts, hidden], in float64."""
    gram = sum((m.gram.double() / m.count for m in moments), torch.zeros_like(moments[0].gram, dtype=torch.float64))
    means = torch.stack([m.total.double() / m.count for m in moments])
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solved: Tensor = torch.linalg.solve(gram, means.T)
    return solved.T


def _hit(router: Tensor, held: Sequence[Tensor], expert: int) -> float:
    """Share of held-out tokens whose largest value is the expert's."""
    x = torch.cat(list(held)).double().to(router.device)
    return float(((x @ router.T).argmax(1) == expert).double().mean())

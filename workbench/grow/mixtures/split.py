"""The experts of a divided feed-forward layer and the rows of their router, measured on texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from workbench.activations.feedforward import FeedForward, FeedForwardSample, feed_forward_layers, sample_feed_forward
from workbench.activations.labelled import ItemRow
from workbench.activations.partition import Division, LayerPartition, Partition, divide
from workbench.activations.selectors import Linear, captured, centroids, oracle, ridges
from workbench.activations.sites import find_sites
from workbench.ground.lazy import no_grad, torch
from workbench.ground.results import JsonObject, Number, absent
from workbench.grow.mixtures.texts import load_measured, save_measured
from workbench.models.texts import TextRow
from workbench.steps import GrowContext, Measured

if TYPE_CHECKING:
    from torch import Tensor

RouterOf: TypeAlias = Literal["gate", "ridge"]
EPSILON = 1e-3
"""Largest |logit| of a router on the calibration texts. The weights of selected experts then differ by at most this share from equal
weights, and float32 still tells the logits apart."""
HELD_OUT = 5
"""Every fifth text is held out."""


@dataclass(frozen=True)
class SplitPlan:
    """How a step divides neurons and chooses experts.

    Attributes:
        division: How it divides them. Its seed is also that of the sample of tokens.
        top_k: Number of experts of a token, shared ones included.
        router: How the rows of the router are made.
    """

    division: Division
    top_k: int
    router: RouterOf


@dataclass(frozen=True)
class MeasuredSplit(Measured):
    """A measured partition, with the rows of the routers.

    Attributes:
        partition: The experts of every layer.
        rows: Layer -> row of each expert [experts, hidden]; zeros if a token takes all experts.
    """

    partition: Partition | None = None
    rows: dict[int, Tensor] = field(default_factory=dict)


class SplitRecord(JsonObject):
    """Measurements of a division of neurons."""

    shared: list[int]
    """By layer, number of experts that serve every token."""
    tokens: dict[str, int] | None = absent()
    """Numbers of fitted and of held-out tokens, with texts."""
    captured: dict[str, Number] | None = absent()
    """Router and oracle -> share of held-out activations that the chosen experts have."""


class _Saved(JsonObject):
    """A cached measurement, beside its tensors."""

    method: str
    record: SplitRecord


def measure_split(plan: SplitPlan, texts: Sequence[TextRow] | None, depth: int, context: GrowContext) -> MeasuredSplit:
    """Divide the neurons of every layer, and make the rows of its router. The result is cached.

    Args:
        plan: How.
        texts: Calibration texts as tokens; None if neither the method nor the router needs them.
        depth: Number of layers.
        context: Live model, cache and progress.
    """
    if (cached := _load(context)) is not None:
        return cached
    live, seed = context.live({}), plan.division.seed
    layers = feed_forward_layers(live, find_sites(live, depth, context.device))
    fitted = judged = None
    if texts is not None:
        rows = [ItemRow(row.tokens, len(row.tokens)) for row in texts]
        fit = [row for number, row in enumerate(rows) if number % HELD_OUT] or rows
        context.progress(0, len(layers), "activations")
        fitted = sample_feed_forward(live, layers, fit, seed=seed)
        judged = sample_feed_forward(live, layers, rows[::HELD_OUT], seed=seed)
    partition = divide(plan.division, layers, fitted, progress=lambda done, total: context.progress(done, total, "experts"))
    router = _router(plan, layers, fitted, partition)
    record = SplitRecord(shared=list(partition.shared))
    if fitted is not None and judged is not None:
        shares = {
            name: round(float(captured(judged, partition, selector, plan.top_k).mean()), 4)
            for name, selector in (("router", router), ("oracle", oracle(layers, partition)))
        }
        tokens = {"fitted": fitted.tokens, "held_out": judged.tokens}
        record = SplitRecord(shared=list(partition.shared), tokens=tokens, captured=shares)
    return _save(context, partition, router, record)


@no_grad
def _router(plan: SplitPlan, layers: Sequence[FeedForward], sample: FeedForwardSample | None, partition: Partition) -> Linear:
    """Return the rows of the routers, scaled so that no logit on the sample exceeds `EPSILON`.

    The mean over routed experts is subtracted from their rows, which changes no choice. Rows of shared experts are zeros.
    """
    experts = tuple(partition.layers.values())
    if plan.top_k == plan.division.experts or sample is None:
        return Linear("centroid", tuple(torch.zeros(plan.division.experts, layer.gate_rows().shape[1]) for layer in layers))
    selector = ridges(sample, partition) if plan.router == "ridge" else centroids(layers, partition)
    scaled = []
    for x, rows, of in zip(sample.inputs, selector.rows, experts, strict=True):
        own = rows.clone()
        own[: of.shared] = 0
        own[of.shared :] -= own[of.shared :].mean(0)
        scaled.append(own * (EPSILON / (x @ own.T).abs().max().clamp_min(1e-30)))
    return Linear(selector.name, tuple(scaled))


def _save(context: GrowContext, partition: Partition, router: Linear, record: SplitRecord) -> MeasuredSplit:
    """Write the measurement to the cache, and return it."""
    rows = dict(zip(partition.layers, (r.float().cpu().contiguous() for r in router.rows), strict=True))
    tensors = {f"experts.{n}": of.experts for n, of in partition.layers.items()}
    tensors |= {f"router.{n}": own for n, own in rows.items()}
    save_measured(context, tensors, {"method": partition.method, "record": record.to_dict()})
    return MeasuredSplit({}, {"split": record.to_dict()}, partition, rows)


def _load(context: GrowContext) -> MeasuredSplit | None:
    """Return the cached measurement of an earlier call, or None."""
    if (found := load_measured(context, _Saved)) is None:
        return None
    tensors, saved = found
    numbers = sorted(int(name.partition(".")[2]) for name in tensors if name.startswith("experts."))
    layers = {n: LayerPartition(tensors[f"experts.{n}"], shared) for n, shared in zip(numbers, saved.record.shared, strict=True)}
    rows = {n: tensors[f"router.{n}"] for n in numbers}
    return MeasuredSplit({}, {"split": saved.record.to_dict()}, Partition(saved.method, layers), rows)

"""Partitions of feed-forward neurons into experts of equal size, and the methods that make them.

An expert is a set of neurons: its rows of the matrices into the neurons, and its columns of the matrix out of them. The output of the
layer is the sum of its experts, so all experts together compute what the layer does. Shared experts serve every token, and a selector
chooses some of the others for each token.

Sources: Zhang et al. 2022, MoEfication, arXiv 2110.01786; Pei et al. 2025, CMoE, arXiv 2502.04416.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from workbench.activations.feedforward import FeedForward, FeedForwardSample
from workbench.activations.sites import Progress
from workbench.ground.errors import UsageError
from workbench.ground.files import json_digest
from workbench.ground.lazy import no_grad, np, torch
from workbench.weights.digests import tensor_digest

if TYPE_CHECKING:
    from torch import Tensor


PartitionMethod: TypeAlias = Literal["random", "kmeans", "coactivation", "cmoe"]
METHODS: tuple[PartitionMethod, ...] = ("random", "kmeans", "coactivation", "cmoe")
WITH_TEXTS = frozenset({"coactivation", "cmoe"})
"""Methods that look at activations. The others need them only to choose shared experts."""
MARKERS = 10
"""CMoE: neurons that a token marks."""
ACTIVE = 0.1
"""Share of the neurons of a token that count as active for `coactivation`, and for the choice of shared experts."""


@dataclass(frozen=True)
class LayerPartition:
    """The experts of one layer.

    Attributes:
        experts: Neurons of each expert in ascending order [experts, size] int64. Every neuron is in one expert.
        shared: Number of experts at the start that serve every token.
    """

    experts: Tensor
    shared: int = 0

    def members(self) -> Tensor:
        """Return the expert of each neuron [neurons] int64."""
        members = torch.empty(self.experts.numel(), dtype=torch.long)
        members[self.experts.flatten()] = torch.arange(len(self.experts)).repeat_interleave(self.experts.shape[1])
        return members

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums over each expert's neurons [..., experts] of values of all neurons [..., neurons]."""
        index = self.experts.to(values.device)
        result: Tensor = values[..., index.flatten()].reshape(*values.shape[:-1], *index.shape).sum(-1)
        return result


@dataclass(frozen=True)
class Partition:
    """Experts of all feed-forward layers of a model.

    Attributes:
        method: Method that made it.
        layers: Layer -> its experts.
    """

    method: str
    layers: Mapping[int, LayerPartition]

    @property
    def experts(self) -> int:
        """Number of experts of a layer, shared ones included."""
        return len(next(iter(self.layers.values())).experts)

    @property
    def shared(self) -> tuple[int, ...]:
        """Number of shared experts of each layer."""
        return tuple(layer.shared for layer in self.layers.values())

    def digest(self) -> str:
        """Return a digest of the experts."""
        return json_digest(
            [[number, tensor_digest(layer.experts), layer.shared] for number, layer in sorted(self.layers.items())]
        )


@dataclass(frozen=True)
class Division:
    """How neurons are divided into experts of equal size.

    Attributes:
        method: `random`; `kmeans`, balanced clusters of the normalized rows of the gate; `coactivation`, balanced clusters of the
            tokens on which neurons are active; or `cmoe`.
        experts: Number of experts of a layer, shared ones included.
        shared: Number of shared experts. They take the neurons that are active most often. None is the method's own choice: three of
            eight for `cmoe`, and none for the others.
        most_shared: Largest number of shared experts that the method may choose; None allows all experts but one.
        seed: Seed of `random` and of the first centers.
    """

    method: PartitionMethod
    experts: int
    shared: int | None = None
    most_shared: int | None = None
    seed: int = 0

    def chosen(self, count: int) -> int:
        """Return the number of shared experts of a method that would choose `count` of them."""
        if self.shared is not None:
            return self.shared
        return min(count, self.experts - 1 if self.most_shared is None else min(self.most_shared, self.experts - 1))

    def check(self, units: Mapping[int, int]) -> None:
        """Check that layers can be divided into these experts.

        Args:
            units: Layer -> number of its neurons.

        Raises:
            WorkbenchError: If they cannot.
        """
        if self.experts < 2:
            raise UsageError(f"expected at least 2 experts, found {self.experts}")
        for layer, count in units.items():
            if count % self.experts:
                near = [e for e in range(2, min(count, 257)) if count % e == 0]
                best = ", ".join(map(str, sorted(sorted(near, key=lambda e: abs(e - self.experts))[:4])))
                raise UsageError(
                    f"layer {layer} has {count} neurons, which {self.experts} experts do not divide into equal parts",
                    f"Numbers that do: {best}." if near else None,
                )
        if self.shared is not None and not 0 <= self.shared < self.experts:
            raise UsageError(f"expected 0 to {self.experts - 1} shared experts of {self.experts}, found {self.shared}")


@no_grad
def divide(
    division: Division,
    layers: Sequence[FeedForward],
    sample: FeedForwardSample | None = None,
    *,
    progress: Progress = lambda *_: None,
) -> Partition:
    """Divide the neurons of every layer into experts of equal size.

    Args:
        division: How.
        layers: The layers.
        sample: Inputs and activations of the layers; None if neither the method nor `shared` needs them.
        progress: Callback that takes (layers done, layers).

    Raises:
        WorkbenchError: If the experts do not divide the neurons, or a sample is missing.
    """
    division.check({layer.site.layer: layer.site.units for layer in layers})
    method, shared = division.method, division.shared
    if sample is None and (method in WITH_TEXTS or shared):
        raise UsageError(
            f"a partition by {method}{'' if method in WITH_TEXTS else ' with shared experts'} looks at activations, and has no texts",
            "Name a file of calibration texts.",
        )
    made: dict[int, LayerPartition] = {}
    for number, layer in enumerate(layers):
        made[layer.site.layer] = _MAKERS[method](_Layer(layer, number, division, sample))
        progress(number + 1, len(layers))
    return Partition(method, made)


@dataclass(frozen=True)
class _Layer:
    """One layer while it is divided."""

    layer: FeedForward
    number: int
    division: Division
    sample: FeedForwardSample | None

    @property
    def seed(self) -> int:
        """Seed of the layer."""
        return self.division.seed + self.layer.site.layer

    @property
    def size(self) -> int:
        """Number of neurons of an expert."""
        return self.layer.site.units // self.division.experts

    def active(self) -> Tensor:
        """Return which neurons are active on each token: those with the largest magnitudes [tokens, neurons] bool."""
        assert self.sample is not None
        return marked(self.sample.magnitudes(self.number), max(1, round(ACTIVE * self.layer.site.units)))

    def split(self, shared: int, order: Tensor | None, cluster: Callable[[Tensor, int], Tensor]) -> LayerPartition:
        """Give the first neurons of an order to shared experts, and the others to clusters.

        Args:
            shared: Number of shared experts.
            order: All neurons, those of shared experts first; only needed with shared experts.
            cluster: Function from (the other neurons in ascending order, number of clusters) to the cluster of each.
        """
        neurons = torch.arange(self.layer.site.units)
        fixed = neurons[:0] if order is None else order[: shared * self.size]
        rest = neurons[~torch.isin(neurons, fixed)]
        members = cluster(rest, self.division.experts - shared)
        groups = [*fixed.reshape(shared, self.size), *(rest[members == c] for c in range(self.division.experts - shared))]
        return LayerPartition(torch.stack([group.sort().values for group in groups]), shared)


def marked(values: Tensor, count: int) -> Tensor:
    """Return which values of each row are among its largest by magnitude [rows, columns] bool."""
    chosen = values.abs().topk(count, dim=1).indices
    return torch.zeros(values.shape, dtype=torch.bool).scatter_(1, chosen.cpu(), True)


def _by_rate(active: Tensor) -> Tensor:
    """Return all neurons, those that are active on most tokens first."""
    return active.sum(0).argsort(descending=True, stable=True)


def _random(work: _Layer) -> LayerPartition:
    def cluster(rest: Tensor, clusters: int) -> Tensor:
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(work.seed))
        return order % clusters

    shared = work.division.chosen(0)
    return work.split(shared, _by_rate(work.active()) if shared else None, cluster)


def _kmeans(work: _Layer) -> LayerPartition:
    rows = torch.nn.functional.normalize(work.layer.gate_rows().cpu(), dim=1)
    shared = work.division.chosen(0)
    order = _by_rate(work.active()) if shared else None
    return work.split(
        shared,
        order,
        lambda rest, clusters: balanced_kmeans(rows[rest], clusters, seed=work.seed),
    )


def _coactivation(work: _Layer) -> LayerPartition:
    active = work.active()
    bits = torch.nn.functional.normalize(active.T.float(), dim=1)
    return work.split(
        work.division.chosen(0),
        _by_rate(active),
        lambda rest, clusters: balanced_kmeans(bits[rest], clusters, seed=work.seed),
    )


def _cmoe(work: _Layer) -> LayerPartition:
    """Divide a layer as CMoE does: markers, shared experts by rate, one balanced assignment by the L1 distance of markers.

    The first centers are the markers of the neurons that are marked most often, without those of shared experts.
    """
    assert work.sample is not None
    markers = marked(normalized_activations(work.layer, work.sample.inputs[work.number]), min(MARKERS, work.layer.site.units))
    by_neuron = markers.T.float()
    order = _by_rate(markers)
    count = work.division.chosen(3 * work.division.experts // 8)

    def cluster(rest: Tensor, clusters: int) -> Tensor:
        first = by_neuron[order[count * work.size :][:clusters]]
        return assign(torch.cdist(by_neuron[rest], first, p=1.0))

    return work.split(count, order, cluster)


def normalized_activations(layer: FeedForward, inputs: Tensor) -> Tensor:
    """Return the activations with inputs and rows divided by their norms [tokens, neurons], as CMoE compares neurons."""
    x = torch.nn.functional.normalize(inputs, dim=-1)
    gate = layer.activated(x @ torch.nn.functional.normalize(layer.gate_rows().cpu(), dim=1).T)
    if not layer.is_gated:
        return gate
    return gate * (x @ torch.nn.functional.normalize(layer.up_rows().cpu(), dim=1).T)


_MAKERS: dict[PartitionMethod, Callable[[_Layer], LayerPartition]] = {
    "random": _random,
    "kmeans": _kmeans,
    "coactivation": _coactivation,
    "cmoe": _cmoe,
}


EXACT = 2048
"""Largest number of points that are assigned at the least total cost. More points are assigned greedily."""
ITERATIONS = 10


def assign(costs: Tensor, *, exact: bool = True) -> Tensor:
    """Assign points to clusters of equal size at a low total cost.

    Args:
        costs: Cost of each point in each cluster [points, clusters]. The number of points is a multiple of the number of clusters.
        exact: Find the least total cost if there are at most `EXACT` points; otherwise assign greedily.

    Returns:
        Cluster of each point [points] int64.

    Raises:
        ValueError: If the number of points is no multiple of the number of clusters.
    """
    points, clusters = costs.shape
    if points % clusters:
        raise ValueError(f"{points} points cannot form {clusters} clusters of equal size")
    size = points // clusters
    if not exact or points > EXACT:
        return _greedy(costs, size)
    from scipy.optimize import linear_sum_assignment

    _, slots = linear_sum_assignment(costs.double().cpu().numpy().repeat(size, axis=1))
    return torch.from_numpy(slots // size)


def _greedy(costs: Tensor, size: int) -> Tensor:
    """Assign each point to its best cluster with a free place; points that would lose most by their second choice come first."""
    values = costs.double().cpu()
    order = values.argsort(dim=1, stable=True).numpy()
    two = values.sort(1).values[:, :2]
    regret = two[:, -1] - two[:, 0]
    free = np.full(costs.shape[1], size)
    clusters = np.empty(len(order), np.int64)
    for point in regret.argsort(descending=True, stable=True).tolist():
        clusters[point] = next(c for c in order[point] if free[c])
        free[clusters[point]] -= 1
    return torch.from_numpy(clusters)


def balanced_kmeans(points: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Divide points into clusters of equal size that are close to their means.

    Iterations assign greedily; the last assignment has the least total cost if there are at most `EXACT` points.

    Args:
        points: The points [points, width].
        clusters: Number of clusters, which divides the number of points.
        seed: Seed of the first centers, which are drawn far apart (k-means++).

    Returns:
        Cluster of each point [points] int64.

    Raises:
        ValueError: If the number of points is no multiple of the number of clusters.
    """
    values = points.float()
    centers = _first_centers(values, clusters, seed)
    members = assign(_squared(values, centers), exact=False)
    for _ in range(ITERATIONS):
        centers = means(values, members, clusters)
        moved = assign(_squared(values, centers), exact=False)
        if torch.equal(moved, members):
            break
        members = moved
    return assign(_squared(values, means(values, members, clusters)))


def means(points: Tensor, members: Tensor, clusters: int) -> Tensor:
    """Return the mean of each cluster [clusters, width]; every cluster has at least one point."""
    sums = points.new_zeros(clusters, points.shape[1]).index_add_(0, members, points)
    result: Tensor = sums / torch.bincount(members, minlength=clusters)[:, None]
    return result


def _squared(points: Tensor, centers: Tensor) -> Tensor:
    """Return the squared distances [points, centers]."""
    return points.square().sum(1, keepdim=True) - 2 * points @ centers.T + centers.square().sum(1)


def _first_centers(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Draw points as centers, each with a probability proportional to its squared distance to the nearest earlier one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = _squared(points, points[chosen])[:, 0].clamp_min(0)
    while len(chosen) < clusters:
        weights = nearest if float(nearest.sum()) > 0 else torch.ones(len(points))
        chosen.append(int(torch.multinomial(weights.cpu(), 1, generator=generator)))
        nearest = torch.minimum(nearest, _squared(points, points[chosen[-1:]])[:, 0].clamp_min(0))
    return points[chosen]

"""DARE: drop elements of each delta at random, scale up the rest; then sum, or elect signs as TIES does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import xxhash
from pydantic import Field
from torch import Tensor

from workbench.fields import BrickEntry, Bricks, Number, Share, Space
from workbench.registry import Block, Group, Laws, MergeMethod, register
from workbench.weights import kernels


class DareEntry(BrickEntry):
    """A brick's fields in a DARE step."""

    density: Share | None = None
    """Probability that an element of this brick's delta is kept; omitted: the step's."""


@register
class Dare(MergeMethod):
    """Drop and rescale (Yu et al. 2024, DARE): each element of a delta is kept with probability `density`.

    The mask of a brick's tensor depends on the recipe's seed, the brick's content and the tensor's name alone: not on the other
    bricks, their order, the device or the number of threads. mergekit's `dare_linear` is {rescale: l1}, its `dare_ties`
    with `normalize: true` {rescale: l1, then: ties}, with masks of their own; without (its default) it sums what agrees.
    """

    paper = "Yu et al. 2024, Language models are super Mario, arXiv 2311.03099"
    formula = "θ = θ₀ + λ Σ wᵢ · mᵢ⊙τᵢ / p,  mᵢ ~ Bernoulli(p);  with `then: ties` the elected mean in place of the sum"
    laws = Laws(single_is_identity=False, spaces=("full", "core"), random=True)

    merge: Literal["dare"]
    bricks: Bricks[DareEntry] | None = None
    """Brick name -> weight, or {weight:, density:}; omitted: all with weight 1."""
    density: Share = 0.5
    """Probability that an element is kept."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    rescale: Literal["inverse", "l1", "none"] = "inverse"
    """Multiply what is kept by 1/density (the paper), by the factor that keeps the tensor's sum of magnitudes (mergekit; one more
    pass), or not at all."""
    then: Literal["sum", "ties"] = "sum"
    """Sum the deltas, or elect one sign per element and divide the sum of those that agree by the sum of their weights."""

    space: Space = "full"
    """Merge whole deltas, or the core matrices of adapters (core): drops in the basis that the adapters share, which is another result."""

    def prepare(self, group: Group) -> Callable[[Block], Tensor]:
        """Draw each brick's mask where its elements are read."""
        weights, lam, shares = group.values("weight"), group.value("lam"), group.values("density")
        keys = [mask_key(group.seed, key, group.tensor) for key in group.keys]
        scales = [1 / share if share > 0 and self.rescale == "inverse" else 1.0 for share in shares]
        if self.rescale == "l1":
            scales = self._l1(group, keys, shares)
        cols, ties = group.spec.cols, self.then == "ties"

        def delta(block: Block) -> Tensor:
            for values, key, share, scale in zip(block.deltas, keys, shares, scales, strict=True):
                kernels.drop(values, key, block.start * cols, share, scale)
            if ties:
                return kernels.elect(block.deltas, weights, lam, before=True, frequency=False, count=False)
            total = block.deltas[0].mul_(lam * weights[0])
            for values, weight in zip(block.deltas[1:], weights[1:], strict=True):
                total.add_(values.mul_(lam * weight))
            return total

        return delta

    @staticmethod
    def _l1(group: Group, keys: list[int], shares: list[float]) -> list[float]:
        """Sum of magnitudes before over after, a brick."""
        before, after = [0.0] * len(keys), [0.0] * len(keys)
        for block in group.blocks():
            for i, (values, key, share) in enumerate(zip(block.deltas, keys, shares, strict=True)):
                before[i] += float(values.abs().sum())
                kernels.drop(values, key, block.start * group.spec.cols, share, 1.0)
                after[i] += float(values.abs_().sum())
        return [full / kept if kept > 0 else 1.0 for full, kept in zip(before, after, strict=True)]


def mask_key(seed: int, brick: str, tensor: str) -> int:
    """64 bits that a random mask starts from: of the recipe's seed, the brick's content key and the tensor's name."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{brick}\0{tensor}".encode())

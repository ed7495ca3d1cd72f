"""DARE: drop elements of each delta at random, scale up the rest; then sum, or elect signs as TIES does."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import xxhash
from pydantic import Field

from workbench.steps import Group, Laws, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Share, Space
from workbench.weights.sparse import Drop, Selection, Vote, drop_sums
from workbench.weights.specs import block_elements


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

    version = 3  # masks depend on the whole content of a brick, no longer on a sample of it

    merge: Literal["dare"]
    bricks: Bricks[DareEntry] | None = None
    """Brick name -> weight, or {weight:, density:}; a list of names gives each weight 1; omitted: all with weight 1."""
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

    def prepare(self, group: Group) -> Selection:
        """Each brick's mask is drawn where its elements are read."""
        shares = group.values("density")
        drops = [Drop(mask_key(group.seed, key, group.tensor), share) for key, share in zip(group.keys, shares, strict=True)]
        if self.rescale == "inverse":
            drops = [replace(drop, scale=1 / drop.share if drop.share > 0 else 1.0) for drop in drops]
        elif self.rescale == "l1":
            drops = _keep_l1(group, drops)
        vote = Vote(before=True, frequency=False, count=False) if self.then == "ties" else None
        return Selection(drops, group.values("weight"), group.value("lam"), vote)


def _keep_l1(group: Group, drops: list[Drop]) -> list[Drop]:
    """Scale what is kept so that every delta's sum of magnitudes stays."""
    sums: list[list[float]] = [[0.0, 0.0] for _ in drops]
    for start, stop in group.spec.blocks(block_elements(group.device)):
        rows = group.rows(start, stop)
        for i, drop in enumerate(drops):
            found = drop_sums(rows, i, drop, start * group.spec.cols, sums[i])
            if found is None:
                group.refuse_non_finite(start, stop)
            else:
                sums[i] = found
    return [replace(drop, scale=full / kept if kept > 0 else 1.0) for drop, (full, kept) in zip(drops, sums, strict=True)]


def mask_key(seed: int, brick: str, tensor: str) -> int:
    """64 bits that a random mask starts from: of the recipe's seed, the brick's content key and the tensor's name."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{brick}\0{tensor}".encode())

"""DARE: drop random elements of each delta and rescale the rest; then sum the deltas, or elect signs as in TIES."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import xxhash
from pydantic import Field

from workbench.steps import Group, Laws, OverlapWeighted, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Share, Space
from workbench.weights.sparse import Drop, Selection, Vote, drop_sums
from workbench.weights.specs import block_elements


class DareEntry(BrickEntry):
    """A brick's fields in a DARE step."""

    density: Share | None = None
    """Probability that an element of this brick's delta is kept; if omitted, the step's `density`."""


@register
class Dare(OverlapWeighted):
    """Drop random elements of each delta and rescale the rest (Yu et al. 2024, DARE).

    Each element of a delta is kept with probability `density`. The mask depends only on the recipe's seed, the brick's content and
    the tensor's name.

    mergekit's `dare_linear` corresponds to {rescale: l1}, and its `dare_ties` with `normalize: true` to {rescale: l1, then: ties}; it
    draws other masks. By default (`normalize: false`) its `dare_ties` sums the deltas that agree.
    """

    paper = "Yu et al. 2024, Language models are super Mario, arXiv 2311.03099"
    formula = "θ = θ₀ + λ Σ wᵢ · mᵢ⊙τᵢ / p,  mᵢ ~ Bernoulli(p);  with `then: ties` the elected mean replaces the sum"
    laws = Laws(single_is_identity=False, spaces=("full", "core"), random=True)

    version = 3  # masks depend on the whole content of a brick, no longer on a sample of it

    merge: Literal["dare"]
    bricks: Bricks[DareEntry] | None = None
    """Mapping of brick name to weight, or to {weight:, density:}. A list: each has weight 1. Default: all bricks."""
    density: Share = 0.5
    """Probability that an element is kept."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    rescale: Literal["inverse", "l1", "none"] = "inverse"
    """Rescaling of the kept elements: by 1/density as in the paper (`inverse`), by the factor that preserves the tensor's sum
    of magnitudes as in mergekit (`l1`, which reads the deltas once more), or not at all (`none`)."""
    then: Literal["sum", "ties"] = "sum"
    """`sum` adds the deltas. `ties` elects one sign per element and divides the sum of the agreeing deltas by the sum of their
    weights."""

    space: Space = "full"
    """`full` merges whole deltas. `core` merges the small core matrices of adapters, which drops elements in the adapters' common
    basis and gives a different result."""

    def takes_arrays(self) -> bool:
        """Return True: drops and sums are compiled loops."""
        return True

    def prepare(self, group: Group) -> Selection:
        """Return a selection that draws each brick's mask while the brick's elements are read."""
        shares = group.values("density")
        drops = [Drop(mask_key(group.seed, key, group.tensor), share) for key, share in zip(group.keys, shares, strict=True)]
        if self.rescale == "inverse":
            drops = [replace(drop, scale=1 / drop.share if drop.share > 0 else 1.0) for drop in drops]
        elif self.rescale == "l1":
            drops = _keep_l1(group, drops)
        vote = Vote(before=True, frequency=False, count=False) if self.then == "ties" else None
        return Selection(drops, group.values("weight"), group.value("lam"), vote)


def _keep_l1(group: Group, drops: list[Drop]) -> list[Drop]:
    """Return the drops with the scales that preserve each delta's sum of magnitudes."""
    sums: list[list[float]] = [[0.0, 0.0] for _ in drops]
    for start, stop in group.spec.blocks(block_elements(group.device)):
        rows = group.rows(start, stop)
        for i, drop in enumerate(drops):
            updated = drop_sums(rows, i, drop, start * group.spec.cols, sums[i])
            if updated is None:
                group.refuse_non_finite(start, stop)
            else:
                sums[i] = updated
    return [
        replace(drop, scale=full / remaining if remaining > 0 else 1.0)
        for drop, (full, remaining) in zip(drops, sums, strict=True)
    ]


def mask_key(seed: int, brick: str, tensor: str) -> int:
    """Return the 64-bit seed of a random mask: a hash of the recipe's seed, the brick's content key and the tensor's name."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{brick}\0{tensor}".encode())

"""The bricks of a merge step: their deltas, their order, and what they may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from workbench.merge.streaming.deltas import Deltas
from workbench.weights.masks import TensorMask


@dataclass(frozen=True)
class StepBricks:
    """The bricks of a merge step.

    Attributes:
        deltas: Their deltas by name.
        keys: Sort keys by name; the name itself for a brick without one. If the method is permutation invariant, bricks are processed
            in the order of these keys, so that the last bits of sums depend neither on the bricks' names nor on their order in the
            recipe.
        digests: Function that returns the digest of each brick's content, for random masks and the memo. It may read whole bricks,
            so it is called only when a method needs it. None: the sort keys.
        masks: Base's tensor -> the rows or columns that the step may change; other tensors may change everywhere. The bricks' deltas
            are zero elsewhere (`MaskedDeltas`), and current values stay there, although some methods spread a delta over its tensor.
    """

    deltas: Mapping[str, Deltas]
    keys: Mapping[str, str] = field(default_factory=dict)
    digests: Callable[[], Mapping[str, str]] | None = None
    masks: Mapping[str, TensorMask] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """Return the sort key of a brick."""
        return self.keys.get(name, name)

    def in_order(self, *, by_key: bool) -> dict[str, Deltas]:
        """Return the deltas in the order of their keys, or in that of the recipe."""
        order = sorted(self.deltas, key=lambda name: (self.key(name), name)) if by_key else self.deltas
        return {name: self.deltas[name] for name in order}

    def contents(self) -> Mapping[str, str]:
        """Return the digest of each brick's content."""
        return self.digests() if self.digests else {name: self.key(name) for name in self.deltas}

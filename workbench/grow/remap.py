"""The weights of a grown model, read from those that it grew from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from workbench.registry import Growth
from workbench.weights.specs import Source, TensorSpec, Weights


class GrownWeights:
    """New names over the current tensors. Bricks reach the tensors that were there before, under their old names."""

    def __init__(self, current: Weights, growth: Growth) -> None:
        self._current = current
        self._growth = growth

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shapes of the sources, under the grown names."""
        return {name: self._current.specs[grown.source] for name, grown in self._growth.tensors.items()}

    def origin(self, name: str) -> str | None:
        """The base's tensor for what was there before, None for what growth added."""
        grown = self._growth.tensors[name]
        return None if grown.new else self._current.origin(grown.source)

    def open(self, name: str, device: torch.device) -> Source:
        """The source tensor, or zeros."""
        grown = self._growth.tensors[name]
        return _Zeros() if grown.zero else self._current.open(grown.source, device)


class _Zeros:
    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.zero_()

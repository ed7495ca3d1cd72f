"""A base that is a checkpoint with an adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.adapters.bind import BoundAdapter, bind
from workbench.bricks.brick import Brick, checkpoint_digest
from workbench.errors import WorkbenchError, shell
from workbench.files import json_digest
from workbench.lazy import torch
from workbench.models.cleanup import tidy
from workbench.models.layout import Model
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import Source, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor


class AdaptedCheckpoint(Checkpoint):
    """The checkpoint of a model with an adapter on it: the files are the model's, and every tensor is read with the adapter's update.

    Args:
        plain: The model's checkpoint.
        adapter: The adapter.

    Raises:
        WorkbenchError: If the adapter does not fit the model, or unties its head from its embeddings.
    """

    def __init__(self, plain: Checkpoint, adapter: Brick) -> None:
        super().__init__(plain.path, plain.label)
        tidy(self)
        self.adapter = adapter
        model = Model(plain, plain.config)
        if reason := adapter.unties(model):
            raise WorkbenchError(
                f"base: the adapter {reason}, which a base with an adapter cannot represent",
                f"Bake it into a checkpoint: `{shell('workbench', 'brick', 'bake', adapter.path, '--base', plain.path, '-o', 'DIR')}`.",
            )
        self._bound: BoundAdapter = bind(adapter.adapter, plain.specs, model)

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor with the adapter's update."""
        source = super().open(name, device)
        return _Updated(source, self, name, device) if self._bound.touches(name) else source

    @property
    def bound(self) -> BoundAdapter:
        """The adapter's updates."""
        return self._bound


class _Updated:
    """A stored tensor plus the adapter's update, in float32."""

    def __init__(self, source: Source, owner: AdaptedCheckpoint, name: str, device: torch.device) -> None:
        self._source, self._cols = source, owner.specs[name].cols
        self._delta = owner.bound.open_delta(name, device)
        self._scratch = buffer(owner.specs[name], device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop."""
        update = matrix(self._scratch, start, stop, self._cols)
        self._source.read(start, stop, out)
        self._delta.read_delta(start, stop, out, update)
        out.add_(update)


def base_adapter(checkpoint: Checkpoint) -> Brick | None:
    """Return the adapter of a base that has one."""
    return checkpoint.adapter if isinstance(checkpoint, AdaptedCheckpoint) else None


def base_digest(checkpoint: Checkpoint, cache: Path | None) -> str:
    """Return the digest of a base, including its adapter.

    Args:
        checkpoint: The base.
        cache: Directory that caches digests of tensors; None reads all tensors.
    """
    digest, adapter = checkpoint_digest(checkpoint, cache), base_adapter(checkpoint)
    return digest if adapter is None else json_digest([digest, adapter.digest(cache)])

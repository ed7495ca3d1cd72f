"""The interface of a brick, whether it is a directory on disk or another recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from workbench.bricks.standins import Download
from workbench.models.layout import Model


class BrickSource(Protocol):
    """A brick of a recipe: a directory (`bricks.brick.Brick`) or a recipe (`resolve.resolved.RecipeBrick`).

    The argument `cache` is the project's cache, which stores digests of tensors. Deltas are not part of the interface, because
    the deltas of a recipe exist only after it has been composed; `run.compose` makes them.
    """

    @property
    def name(self) -> str:
        """Name of the brick in the recipe."""

    @property
    def kind(self) -> str:
        """The kind of brick: "adapter", "checkpoint" or "recipe"."""

    @property
    def public_name(self) -> str:
        """A name without local paths, for model cards."""

    @property
    def revision(self) -> str | None:
        """Commit of the hub repository; None for a local directory or a recipe."""

    @property
    def headers_only(self) -> bool:
        """True if only headers of the weights are on this machine."""

    @property
    def downloads(self) -> Sequence[Download]:
        """Downloads that are required before the weights can be read."""

    @property
    def deferred(self) -> Sequence[str]:
        """Checks of the brick that are left to `run`, because they need tensors that are not local."""

    @property
    def stored_bytes(self) -> int:
        """Size of the weights on disk in bytes; for a recipe, that of the bricks that its steps use."""

    @property
    def input_bytes(self) -> int:
        """Number of bytes read to get the weights; for a recipe, the size of its base and of all its bricks."""

    def digest(self, cache: Path) -> str:
        """Return a digest of the content, reading only tensors whose digest is not cached."""

    def fingerprint(self, cache: Path) -> str:
        """Return a sort key from a sample of the content, which different bricks may share."""

    def known(self, cache: Path) -> bool:
        """Return whether `digest` is fast, because the digests of all large files are cached."""

    def stamp(self, cache: Path) -> str:
        """Return a substitute for `digest`, from the paths, sizes and modification times of large files."""

    def check_inputs(self) -> None:
        """Check that no file has changed since it was opened.

        Raises:
            InputChangedError: If a file has changed.
        """

    def unties(self, base: Model) -> str | None:
        """Describe how the brick unties a tied base's head from its embeddings; return None if they stay one tensor."""

    def licence(self) -> str | None:
        """Return the license; None if none is stated."""

    def data_licences(self) -> Sequence[tuple[str, str, str]]:
        """Return (brick, data set, license) for the training data; "unknown" if no license is stated."""

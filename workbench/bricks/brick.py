"""The bricks that a recipe refers to: files, kinds, cards, digests, and the interface that they share with recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from workbench.bricks.card import Axes, BrickCard, axes_of, read_licence
from workbench.bricks.header_folders import Download, download_of
from workbench.ground.files import json_digest
from workbench.ground.foreign_names import ADAPTER_WEIGHTS
from workbench.ground.identity import check_unchanged
from workbench.models.architecture import is_head, tied_embeddings
from workbench.models.layout import Model
from workbench.models.sentences import modules_of
from workbench.models.skeleton import tidy
from workbench.weights.checkpoint import Checkpoint, read_config
from workbench.weights.digests import digests_known, fingerprint, meaning_of, stamp, tensor_digests, weights_digest
from workbench.weights.header import Entry, has_headers_only

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter


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
        """Check that no file has changed since it was opened."""

    def unties(self, base: Model) -> str | None:
        """Describe how the brick unties a tied base's head from its embeddings; return None if they stay one tensor."""

    def licence(self) -> str | None:
        """Return the license; None if none is stated."""

    def data_licences(self) -> Sequence[tuple[str, str, str]]:
        """Return (brick, data set, license) for the training data; "unknown" if no license is stated."""


STARTER = "bricks/starter/base"


@dataclass(frozen=True)
class Brick:
    """An adapter or checkpoint on disk. Implements `bricks.source.BrickSource`.

    Attributes:
        name: Name of the brick in the recipe.
        kind: "adapter" or "checkpoint".
        path: Directory of the weights.
        card: Content of brick.yaml, or None if the brick has no card.
        revision: Commit of the hub repository, or None for a local directory.
        part: Part of a multimodal checkpoint that the brick is: "language"; None for the whole model.
    """

    name: str
    kind: str
    path: Path
    card: BrickCard | None = None
    revision: str | None = None
    part: str | None = None

    @property
    def label(self) -> str:
        """Name of the brick in messages."""
        return f"brick '{self.name}'"

    @property
    def public_name(self) -> str:
        """The card's name, the hub id or the directory's name, for model cards."""
        if self.card:
            return self.card.name
        root = modules_of(self.path)[0]
        return root.parent.parent.name.removeprefix("models--").replace("--", "/") if self.revision else root.name

    @property
    def headers_only(self) -> bool:
        """True if only the headers of the weights are on this machine; see `header_folders`."""
        return has_headers_only(self.path)

    @property
    def downloads(self) -> tuple[Download, ...]:
        """The download that is required before the weights can be read; empty if they are local."""
        download = download_of(self.path)
        return (download,) if download else ()

    @property
    def deferred(self) -> tuple[str, ...]:
        """Checks of a checkpoint that are left to `run`, because they need tensors that are not local."""
        return tuple(self.checkpoint.deferred) if self.kind == "checkpoint" else ()

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter."""
        from workbench.adapters.read import Adapter

        return Adapter(self.path, self.label)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, or the part of it that the brick is."""
        if self.part is None:
            return self.whole
        from workbench.bricks.language import LanguagePart

        return LanguagePart(self.path, self.label)

    @cached_property
    def whole(self) -> Checkpoint:
        """The checkpoint with all its tensors, also if the brick is a part of it."""
        read_config(self.path, self.label)
        checkpoint = Checkpoint(self.path, self.label)
        tidy(checkpoint)
        return checkpoint

    @property
    def axes(self) -> dict[str, str]:
        """Axis -> value: what the card states, and what follows from the kind and the files; see `bricks.axes`."""
        kind = self.card.kind if self.card else self.kind
        tuner = str(self.adapter.config.get("peft_type", "LORA")) if self.kind == "adapter" else None
        return axes_of(kind, self.card.axes if self.card else Axes(), self.card.training if self.card else None, tuner=tuner)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The stored tensors by name."""
        return self.adapter.entries if self.kind == "adapter" else self.whole.entries

    def files(self) -> list[Path]:
        """Return the files that hold the weights."""
        if self.kind == "adapter":
            return [self.path / ADAPTER_WEIGHTS]
        return list(dict.fromkeys(entry.file for entry in self.whole.entries.values()))

    @property
    def stored_bytes(self) -> int:
        """Size of the files that hold the weights, in bytes."""
        return sum(file.stat().st_size for file in self.files())

    @property
    def input_bytes(self) -> int:
        """Number of bytes read to get the weights: the size of their files."""
        return self.stored_bytes

    def digest(self, cache: Path | None) -> str:
        """Return a digest of the content: the tensors, and settings that change what they mean.

        Args:
            cache: Directory that caches digests of tensors; None reads all tensors.
        """
        if self.kind == "checkpoint":
            digest = checkpoint_digest(self.whole, cache)
            return json_digest([digest, self.part]) if self.part else digest
        return json_digest([tensor_digests(self.adapter.entries, cache), self.adapter.meaning])

    def known(self, cache: Path) -> bool:
        """Return whether `digest` is fast, because the digests of large files are cached."""
        return not self.headers_only if self.kind == "adapter" else digests_known(self.whole.entries, cache)

    def stamp(self, cache: Path) -> str:
        """Return a key of the content that does not read the tensors of a checkpoint or of a header folder, but their settings."""
        if self.kind == "adapter":
            return json_digest([stamp(self.adapter.entries), self.adapter.meaning]) if self.headers_only else self.digest(cache)
        return json_digest([stamp(self.whole.entries), meaning_of(self.whole.config), self.part])

    def fingerprint(self, cache: Path) -> str:
        """Return the key for sorting bricks. It samples the tensors of a checkpoint, so different checkpoints may share a key."""
        return self.digest(cache) if self.kind == "adapter" else fingerprint(self.whole.entries)

    def check_inputs(self) -> None:
        """Check that no file of the weights has changed since its header was read."""
        check_files(self.entries)

    def unties(self, base: Model) -> str | None:
        """Describe how the brick unties a tied base's head from its embeddings; return None if they stay one tensor."""
        if tied_embeddings(base.weights.specs, base.config) is None:
            return None
        if self.kind == "adapter":
            from workbench.adapters.keys import unties

            return unties(self.adapter.keys, base)
        return "has a head of its own" if any(map(is_head, self.checkpoint.specs)) else None

    def licence(self) -> str | None:
        """Return the license from the card or, failing that, from the README."""
        return self.card.licence if self.card and self.card.licence else read_licence(self.path)

    def data_licences(self) -> list[tuple[str, str, str]]:
        """Return (brick, data set, license) for the data that the card names; "unknown" if no license is stated.

        Training data without an entry in `data_licences` counts under the card's own license.
        """
        if self.card is None:
            return []
        named = [self.card.training[key] for key in ("data", "replay") if self.card.training.get(key)]
        files = [str(name["hub"]) if isinstance(name, dict) else str(name) for name in named]
        stated = {**dict.fromkeys(files, self.card.licence), **self.card.data_licences}
        return [(self.name, data, (licence or "unknown").lower()) for data, licence in stated.items()]


def checkpoint_digest(checkpoint: Checkpoint, cache: Path | None) -> str:
    """Return the digest of a checkpoint's weights and configuration, reusing cached digests of tensors.

    Args:
        checkpoint: The checkpoint.
        cache: Directory that caches digests of tensors; None reads all tensors.
    """
    digests = tensor_digests(checkpoint.entries, cache, checkpoint.streamed)
    return weights_digest(checkpoint.specs, digests, checkpoint.config)


def check_files(entries: Mapping[str, Entry]) -> None:
    """Check that no file of some stored tensors has changed since its header was read."""
    for file, identity in {entry.file: entry.identity for entry in entries.values()}.items():
        check_unchanged(file, identity, file)

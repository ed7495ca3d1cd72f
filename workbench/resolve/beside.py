"""What acts on a live model beside its weights: a memory or a router on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MemoryAt:
    """A memory directory at a version, with the digest of its content at that version."""

    path: Path
    version: int
    digest: str


@dataclass(frozen=True)
class RouterAt:
    """A fitted router on disk, and the bricks that it chooses among.

    Attributes:
        path: Directory with routing.json and router.safetensors.
        adapters: Brick -> directory of its PEFT adapter, in the router's order.
        digest: Digest of everything that decides which bricks act, and of the bricks.
    """

    path: Path
    adapters: Mapping[str, Path]
    digest: str

"""Four tasks of four kinds, and an empty project around them."""

from __future__ import annotations

from worlds.four_tasks import project, tasks

__all__ = ["project", "tasks"]

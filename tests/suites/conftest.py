"""Two projects: one with a suite of two small tasks, and an empty one beside four tasks of four kinds."""

from __future__ import annotations

from worlds.four_tasks import project, tasks
from worlds.local_tasks import place

__all__ = ["place", "project", "tasks"]

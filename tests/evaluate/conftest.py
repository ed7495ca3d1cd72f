"""A project with a suite of two small tasks."""

from __future__ import annotations

from worlds.local_tasks import place

__all__ = ["place"]

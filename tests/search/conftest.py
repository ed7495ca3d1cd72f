"""A project to search in."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.project import Project
from worlds.search_world import lay_out


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """Two bricks and a suite of two tasks."""
    return lay_out(project)

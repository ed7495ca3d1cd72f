"""A project to search in, and a synthetic result."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.project import Project
from worlds.search_document import make_search
from worlds.search_page import Document
from worlds.search_world import lay_out


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """Two bricks and a suite of two tasks."""
    return lay_out(project)


@pytest.fixture(scope="module")
def one() -> Document:
    return make_search(40, random=20)

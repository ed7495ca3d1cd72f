"""Projects with facts to edit or to remember."""

from __future__ import annotations

import pytest

from worlds.dense import write_facts_file, write_text
from worlds.jsonl import write_jsonl
from worlds.memory_world import FACTS
from worlds.project import Project


@pytest.fixture
def facts(project: Project) -> Project:
    """The project with four facts and a text for statistics."""
    write_facts_file(project.path / "facts.jsonl", 4)
    write_text(project.path / "text.txt")
    return project


@pytest.fixture
def taught(project: Project) -> Project:
    """The project with the facts of `memory_world`."""
    write_jsonl(project.path / "facts.jsonl", FACTS)
    return project

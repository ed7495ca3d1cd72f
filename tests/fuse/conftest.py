"""A base and a teacher of one small language, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.fused import save_base, save_teacher, text
from worlds.jsonl import write_jsonl
from worlds.project import Project


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `knows`, its teacher. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("language")
    save_base(folder / "base")
    save_teacher(folder / "knows")
    return folder


@pytest.fixture
def school(language: Path, tmp_path: Path) -> Project:
    """A project with the base, the teacher, and a few texts of the language."""
    project = Project.of(tmp_path, language)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text(seed)} for seed in range(1000, 1012)])
    return project

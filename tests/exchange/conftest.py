"""Four tasks of four kinds, and an empty project around them; the project of mergekit's models as the working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.four_tasks import project, tasks

__all__ = ["project", "tasks"]


@pytest.fixture
def in_mergekit_project(mergekit_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project with float32 models for mergekit is the working directory."""
    monkeypatch.chdir(mergekit_project)

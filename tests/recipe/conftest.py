"""The project of mergekit's models as the working directory."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def in_mergekit_project(mergekit_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project with float32 models for mergekit is the working directory."""
    monkeypatch.chdir(mergekit_project)

"""A project that the fuzzers damage one file of at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from worlds.fuzzing import RECIPE
from worlds.project import Project


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory, llama: Path, bricks: Path) -> Path:
    path = tmp_path_factory.mktemp("fuzzed")
    (path / "recipes").mkdir()
    shutil.copytree(llama, path / "base")
    for name in ("one", "full"):
        shutil.copytree(bricks / name, path / "bricks" / name)
    (path / "recipes" / "test.yaml").write_text(RECIPE, "utf-8")
    return path


@pytest.fixture
def fuzzed(_made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """The project, made once a session; every file is put back afterwards."""
    before = {file: file.read_bytes() for file in _made.rglob("*") if file.is_file() and ".workbench" not in file.parts}
    monkeypatch.chdir(_made)
    yield Project(_made)
    for file in [file for file in _made.rglob("*") if file.is_file() and file not in before]:
        file.unlink()
    for file, raw in before.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(raw)

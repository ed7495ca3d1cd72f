"""A project with a suite of two small tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worlds.local_tasks import CHOICE, GENERATE, LOCALDATA, documents, tiny, write_data


@pytest.fixture
def place(tmp_path: Path, tokenizer: Any, cwd: Path) -> Path:
    """A project with the suite `toy` (generation and choices, 24 clusters) and a base of 256 positions."""
    tasks = tmp_path / "evals" / "tasks"
    (tasks / "data").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "evals" / "suites").mkdir()
    (tmp_path / "evals" / "suites" / "toy.yaml").write_text(
        "suite: toy\ndescription: Two small tasks\ntasks: [copy, pick]\ncluster: id\n"
    )
    (tasks / "localdata.py").write_text(LOCALDATA)
    (tasks / "copy.yaml").write_text(GENERATE)
    (tasks / "pick.yaml").write_text(CHOICE)
    write_data(tasks, documents())
    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path

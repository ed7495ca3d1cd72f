"""The project: the directory that holds recipes, bricks and the cache."""

from __future__ import annotations

from pathlib import Path


def find_project(path: Path) -> Path:
    """Return the nearest parent directory with a `recipes/` directory or a `pyproject.toml`, else the file's own directory."""
    start = path.resolve().parent
    return next((d for d in (start, *start.parents) if (d / "recipes").is_dir() or (d / "pyproject.toml").is_file()), start)


CACHE = ".workbench"

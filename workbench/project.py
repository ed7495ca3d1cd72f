"""A project: the folder that recipes, bricks and the cache lie in."""

from __future__ import annotations

from pathlib import Path


def find_project(path: Path) -> Path:
    """The nearest parent with a `recipes/` folder or a `pyproject.toml`, else the file's own folder."""
    start = path.resolve().parent
    return next((d for d in (start, *start.parents) if (d / "recipes").is_dir() or (d / "pyproject.toml").is_file()), start)


CACHE = ".workbench"

"""The project: the directory that holds recipes, bricks, runs and the cache; and paths as users type them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from workbench.ground.foreign_names import ADAPTER, CARD, CONFIG, MANIFEST

_CACHE, _RUNS = ".workbench", "runs"
ENVIRONMENT = "WORKBENCH_CACHE"
_COMPARED = 500  # names of a folder that are compared with a misspelt one


def find_project(path: Path | None = None) -> Path:
    """Return the nearest parent directory with a `recipes/` directory or a `pyproject.toml`, else the file's own directory.

    Args:
        path: The file; None: any file of the current directory.
    """
    start = (path or Path.cwd() / "here").resolve().parent
    return next((d for d in (start, *start.parents) if (d / "recipes").is_dir() or (d / "pyproject.toml").is_file()), start)


def relative(path: Path, start: Path | None = None) -> Path:
    """Return a path relative to a folder, by default the current one, if it lies below it, else unchanged."""
    here = (start or Path.cwd()).resolve()
    inside = next((place for place in (path.resolve(), path.absolute()) if place.is_relative_to(here)), None)
    return path if inside is None else inside.relative_to(here)


def suggestion(path: Path, start: Path | None = None) -> str:
    """Return a sentence with the places that a path may mean: below it, above it, or of a similar name; empty if there are none.

    Args:
        path: The path.
        start: Folder that the user's paths start from; None for the working directory.
    """
    found: list[Path] = []
    with suppress(OSError):  # of a folder that may not be read
        if path.is_dir():
            places = [*sorted(inner for inner in path.iterdir() if inner.is_dir()), path.resolve().parent]
            found = [place for place in places if any((place / name).is_file() for name in (ADAPTER, CONFIG, CARD))]
        else:
            top = next(place for place in path.absolute().parents if place.is_dir())
            wrong, *rest = path.absolute().relative_to(top).parts
            near = get_close_matches(wrong, sorted(inner.name for inner in top.iterdir())[:_COMPARED], n=2, cutoff=0.6)
            found = [place if (place := (top / name).joinpath(*rest)).exists() else top / name for name in near]
    return f"Did you mean {' or '.join(repr(str(relative(place, start))) for place in found[:3])}?" if found else ""


def cache_of(project: Path) -> Path:
    """Return the folder of a project's cache.

    It is $WORKBENCH_CACHE, or `.workbench` in the project. A project that cannot be written to, and a result outside of every project,
    which must keep its files, have theirs in the user's cache.
    """
    if moved := os.environ.get(ENVIRONMENT):
        return Path(moved).expanduser().absolute()
    inside = project / _CACHE
    if is_writable(inside) and not (project / MANIFEST).is_file():
        return inside
    name = f"{project.resolve().name}-{hashlib.sha256(os.fsencode(project.resolve())).hexdigest()[:12]}"
    return next((place / "projects" / name for place in user_caches()), inside)


def runs_of(project: Path, *, writing: bool = False) -> Path:
    """Return the folder of a project's runs and scores: `runs/`, or one in its cache if the project cannot be written to.

    Args:
        project: The project.
        writing: A run is to be written, so that a folder `runs/` that can only be read does not do.
    """
    inside = project / _RUNS
    return inside if is_writable(inside) or (inside.is_dir() and not writing) else cache_of(project) / _RUNS


def is_writable(path: Path) -> bool:
    """Return True if the permissions let a folder be written to, or created. A file in its place is an error of whoever writes."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return os.access(existing, os.W_OK)


def remembered(kind: str, key: str) -> Path:
    """Return the file of what is remembered of a kind under a key, for every project of this user."""
    return next(user_caches(), Path(os.devnull)) / kind / f"{key}.json"


def user_caches() -> Iterator[Path]:
    """Yield directories that are outside every project: the user's cache, then a private one below the temporary directory."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (pathlib raises without a home)
    if not cache_home.startswith("~"):  # the user has no home directory
        yield Path(cache_home) / "brick-workbench"
    private = Path(tempfile.gettempdir()) / f"brick-workbench-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    try:
        private.mkdir(mode=0o700, exist_ok=True)
        stat = private.lstat()
        if not private.is_symlink() and (not hasattr(os, "getuid") or (stat.st_uid == os.getuid() and not stat.st_mode & 0o022)):
            yield private  # no other user can write there
    except OSError:
        return

"""Models and adapters that tests save again and again: made once, and copied from then on, in every process of the tests."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
FOLDER = "WORKBENCH_TESTS_MADE"
"""Variable of the environment that names the folder of what is made; `conftest.py` sets it for all workers. Nothing is kept without it."""


def once(save: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that saves a model to its parameter `out` and returns nothing or that folder.

    The files are made again only for other parameters. A folder among them counts with its path, which adapters name, and its files.
    """
    signature = inspect.signature(save)

    @wraps(save)
    def saved(*args: P.args, **kwargs: P.kwargs) -> R:
        if FOLDER not in os.environ:
            return save(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        out = bound.arguments["out"]
        made_of = [f"{save.__module__}.{save.__name__}", *(_text(v) for k, v in bound.arguments.items() if k != "out")]
        kept = Path(os.environ[FOLDER]) / hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:24]
        if not kept.is_dir():
            part = bound.arguments["out"] = Path(tempfile.mkdtemp(dir=kept.parent)) / "made"
            save(*bound.args, **bound.kwargs)
            try:
                part.rename(kept)
            except OSError:  # another worker was faster
                shutil.rmtree(part)
        shutil.copytree(kept, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
        torch.manual_seed(0)  # what a test draws next does not depend on whether the files had to be made
        return out  # type: ignore[no-any-return]

    return saved


def _text(value: object) -> str:
    """Return what stands for a parameter: the path of a folder and the digests of its files, else its text."""
    if not isinstance(value, Path):
        return repr(value)
    # Weights of real models are not read: their paths and the small files beside them stand for them.
    files = sorted(file for file in value.rglob("*") if file.is_file() and file.stat().st_size < 1 << 24)
    return " ".join(
        [str(value), *(f"{file.relative_to(value)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)]
    )

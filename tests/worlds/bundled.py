"""lm-eval's own tasks: an index of its 14,000 files that is built once in a process."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks._index import TaskIndex

BUNDLED = Path(lm_eval.tasks.__file__).parent
_build = TaskIndex.build


@cache
def _bundled() -> dict[str, Any]:
    return _build([BUNDLED])


def build_once(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
    """Return what `TaskIndex.build` returns; tasks of a later path replace those of an earlier one."""
    index: dict[str, Any] = {}
    for path in paths:
        index |= _bundled() if path == BUNDLED else _build([path], **options)
    return index

"""Configurations on disk: a model, or the name of the base that it is, and the memory that acts on it.

configuration.json   name, base (id, revision, path, digest), digests
model/               the checkpoint of the steps before the memory; left out where that is the base as it is
memory/              see `memories`
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.bricks.hub import FETCH, Hub
from workbench.errors import WorkbenchError
from workbench.files import read_json, write_json
from workbench.project import find_project
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import MemoryAt, Resolved
from workbench.run.memories import SavedMemory

RECORD, MODEL, MEMORY = "configuration.json", "model", "memory"


def refers_to_base(resolved: Resolved) -> bool:
    """Whether a recipe's memory acts on its base as it is, so that no weights are written."""
    alone = resolved.recipe.memory is not None and len(resolved.recipe.steps) == 1
    return alone and resolved.dtype is None and resolved.vocabulary is None and not resolved.unties


def write_record(out: Path, resolved: Resolved, digest: str) -> None:
    """configuration.json."""
    base = {
        "id": resolved.recipe.fields.base, "revision": resolved.base_revision, "path": str(resolved.base_path.resolve()),
        "digest": resolved.base_digest,
    }  # fmt: skip
    write_json(out / RECORD, {"version": 1, "name": resolved.recipe.name, "base": base, "digest": digest}, indent=2)


def is_configuration(path: Path) -> bool:
    """Whether a directory is a configuration."""
    return (path / RECORD).is_file()


def open_configuration(path: Path, version: int | None = None, hub: Hub = FETCH) -> Resolved:
    """A configuration directory as a recipe without steps on its model, with the memory beside it.

    Args:
        path: The directory.
        version: Of the memory; the newest if omitted.
        hub: Whether a base that is no longer where it was may be fetched.

    Errors: no configuration, a base that is gone or has changed.
    """
    record = read_json(path / RECORD)
    if not isinstance(record, dict):
        raise WorkbenchError(
            f"{path}: no {RECORD}, so no configuration", "`workbench run` of a recipe that ends in a memory writes one."
        )
    saved = SavedMemory(path / MEMORY)
    number = saved.log.version if version is None else version
    memory = MemoryAt(saved.path, number, saved.digest(number))
    resolved = replace(_model(path, record, hub), memory=memory)
    return replace(
        resolved, recipe=replace(resolved.recipe, fields=resolved.recipe.fields.model_copy(update={"name": record["name"]}))
    )


def _model(path: Path, record: dict[str, Any], hub: Hub) -> Resolved:
    """The checkpoint beside the memory, or the base that the record names."""
    project, base = find_project(path.resolve() / RECORD), record["base"]
    if (path / MODEL).is_dir():
        return _bare(str((path / MODEL).resolve()), project, hub)
    there = Path(base["path"])
    name = base["id"] if not base["revision"] or "@" in base["id"] else f"{base['id']}@{base['revision']}"
    resolved = _bare(str(there) if (there / "config.json").is_file() else name, project, hub)
    if resolved.base_digest != base["digest"]:
        raise WorkbenchError(
            f"{path}: its base {base['id']} has other weights now ({resolved.base_digest[:10]}, the memory was made on {base['digest'][:10]})",
            "Put the old weights back, or run the recipe again.",
        )
    return resolved


def _bare(base: str, project: Path, hub: Hub) -> Resolved:
    return resolve(from_data({"version": 1, "name": "configuration", "base": base, "steps": []}, project), hub)

"""Configurations on disk: a model, or a reference to an unchanged base, and the memory or the router that acts on it.

configuration.json   name, base (id, revision, path, digest) and digests
model/               the checkpoint of the steps before the memory or router; absent if it equals the base
memory/              see `memories`
routing.json, router.safetensors, adapters/    see `routers`
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.bricks.hub import FETCH, Hub
from workbench.errors import UsageError, WorkbenchError
from workbench.files import read_json, write_json
from workbench.manifest import require_whole
from workbench.project import find_project
from workbench.recipe.recipe import from_data
from workbench.resolve.beside import MemoryAt
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.memories import SavedMemory
from workbench.run.routers import RECORD as ROUTER
from workbench.run.routers import SavedRouter

CONFIGURATION, MODEL, MEMORY = "configuration.json", "model", "memory"


def refers_to_base(resolved: Resolved) -> bool:
    """Return True if a recipe's memory or router acts on the unchanged base, so that no weights are written."""
    alone = bool(resolved.recipe.memory or resolved.recipe.router) and len(resolved.recipe.steps) == 1
    return alone and resolved.dtype_name is None and resolved.vocabulary is None and not resolved.unties


def write_record(out: Path, resolved: Resolved, digest: str) -> None:
    """Write configuration.json.

    Args:
        out: The configuration directory.
        resolved: The recipe.
        digest: Digest of the configuration.
    """
    base = {
        "id": resolved.recipe.fields.base_name,
        "revision": resolved.base_revision,
        "path": str(resolved.base_path.resolve()),
        "digest": resolved.base_digest,
        "tokenizer": resolved.tokens_at(0),
    }
    write_json(out / CONFIGURATION, {"version": 1, "name": resolved.recipe.name, "base": base, "digest": digest}, indent=2)


def is_configuration(path: Path) -> bool:
    """Return True if a directory is a configuration."""
    return (path / CONFIGURATION).is_file()


def open_configuration(path: Path, version: int | None = None, hub: Hub = FETCH) -> Resolved:
    """Resolve a configuration directory as a recipe without steps, with the saved memory or router.

    Args:
        path: The directory.
        version: Version of the memory; the newest if omitted.
        hub: Access to the hub, for a base that is no longer at its recorded path.

    Raises:
        WorkbenchError: If it is not a configuration, its files are not as they were written, its base is missing or has changed, or its router's files do not belong together.
    """
    require_whole(path)
    record = read_json(path / CONFIGURATION)
    if not isinstance(record, dict):
        raise WorkbenchError(
            f"{path} is not a configuration: it has no {CONFIGURATION}",
            "`workbench run` writes one if the recipe ends in a memory or route step.",
        )
    if (path / ROUTER).is_file() and not (path / MEMORY).is_dir():
        if version is not None:
            raise UsageError(f"{path}: a router has no versions, so it has no version {version}", "Remove the version.")
        resolved = replace(_model(path, record, hub, "router"), router=SavedRouter(path).at())
    else:
        saved = SavedMemory(path / MEMORY)
        number = saved.log.version if version is None else version
        memory = MemoryAt(saved.path, number, saved.digest(number))
        resolved = replace(_model(path, record, hub, "memory"), memory=memory)
    return replace(
        resolved, recipe=replace(resolved.recipe, fields=resolved.recipe.fields.model_copy(update={"name": record["name"]}))
    )


def _model(path: Path, record: dict[str, Any], hub: Hub, beside: str) -> Resolved:
    """Resolve the checkpoint in the configuration, or the base that its record names.

    Args:
        path: The configuration directory.
        record: Content of configuration.json.
        hub: Access to the hub.
        beside: "memory" or "router", for messages.
    """
    project, base = find_project(path.resolve() / CONFIGURATION), record["base"]
    if (path / MODEL).is_dir():
        return _bare(str((path / MODEL).resolve()), project, hub)
    recorded = Path(base["path"])
    name = base["id"] if not base["revision"] or "@" in base["id"] else f"{base['id']}@{base['revision']}"
    resolved = _bare(str(recorded) if (recorded / "config.json").is_file() else name, project, hub)
    if resolved.base_digest != base["digest"]:
        raise WorkbenchError(
            f"{path}: the weights or config.json of its base {base['id']} have changed (digest {resolved.base_digest[:10]}, the {beside} was made on "
            f"{base['digest'][:10]})",
            "Restore the old weights, or run the recipe again.",
        )
    if base.get("tokenizer", tokens := resolved.tokens_at(0)) != tokens:  # records of 0.2 have no digest of the tokenizer
        raise WorkbenchError(
            f"{path}: the tokenizer of its base {base['id']} has changed since the {beside} was made",
            "Restore the old tokenizer, or run the recipe again.",
        )
    return resolved


def _bare(base: str, project: Path, hub: Hub) -> Resolved:
    return resolve(from_data({"version": 1, "name": "configuration", "base": base, "steps": []}, project), hub)

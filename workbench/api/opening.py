"""What `workbench open` says of a path, a name or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from workbench.adapters.flavours import check_config
from workbench.api.naming import find
from workbench.bricks.header_folders import snapshot_with
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.foreign_names import ADAPTER, CARD, CONFIG, brick_name, fields_of, retyped
from workbench.ground.project import relative, suggestion
from workbench.ground.recognize import Thing, look
from workbench.run.opened import is_hub_id


def opened(name: str) -> Thing:
    """Return what a path, a name of the project or a hub id is. Nothing is downloaded.

    Args:
        name: A path, also as `file:` address or Windows path; a name that commands take; a hub id, or its web address.

    Raises:
        WorkbenchError: If there is no such thing, or its kind is not known. The message suggests what to type.
    """
    meant = name if Path(name).expanduser().exists() else retyped(name) or name
    path = Path(meant).expanduser()
    if path.exists():
        return _looked(path)
    if is_hub_id(meant):
        return _on_hub(meant)
    if path.is_absolute() or meant != name or len(path.parts) > 1:
        raise WorkbenchError(f"{meant}: no such file or folder", suggestion(path) or None)
    found = find(meant)
    assert found.path is not None
    return _looked(found.path)


def _looked(path: Path) -> Thing:
    """Return what an existing file or folder is, with what its reader says of an adapter."""
    thing = look(path)
    if thing is None:
        hint = suggestion(path) if path.is_dir() else ""
        raise WorkbenchError(
            f"{path}: of no kind that is known here",
            hint or "Name a model, adapter, brick, run, recipe, suite, or a file of facts, items or scores.",
        )
    if thing.kind == "adapter":
        try:
            check_config(fields_of((path if path.is_dir() else path.parent) / ADAPTER), thing.says)
        except WorkbenchError as error:
            problem = f"{error.message.removeprefix(f'{thing.says}: ')}. {error.hint or ''}"
            return thing.model_copy(update={"problem": problem.rstrip(), "commands": []})
    return thing


def _on_hub(name: str) -> Thing:
    """Return what a hub id is, from the hub's cache; of others only the commands that would download it."""
    repository, _, revision = name.partition("@")
    files = (ADAPTER, CONFIG, CARD)
    cached = next(filter(None, (snapshot_with(repository, revision or None, file) for file in files)), None)
    if cached is not None and (thing := look(cached)) is not None:
        said = {str(relative(cached)): name, str(cached): name, cached.name: brick_name(Path(repository))}
        commands = [re.sub("|".join(map(re.escape, said)), lambda found: said[found[0]], command) for command in thing.commands]
        return thing.model_copy(update={"name": name, "says": f"{thing.says}, in the hub's cache", "commands": commands})
    commands = [shell("workbench", "plan", name), shell("workbench", "chat", name)]
    return Thing(
        name=name, kind="hub", says="a hub id that is not in the cache: `plan` reads its headers only", commands=commands
    )

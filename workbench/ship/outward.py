"""Files of a result as others get them: hub ids, names inside the project, or a folder's own name in the place of local directories."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.card import renamed, without_paths
from workbench.ground import jsondoc, yamldoc
from workbench.ground.foreign_names import CARD as BRICK
from workbench.run.card import HEADER, with_header
from workbench.run.memories import RECORD as MEMORY
from workbench.run.opened import CONFIGURATION
from workbench.run.routers import RECORD as ROUTER
from workbench.ship.upload import HUB_ID

CARD = "README.md"
# File -> its fields that can name directories; the other fields decide what the model computes.
_FIELDS = {
    CONFIGURATION: ("base",),
    ROUTER: ("step", "calibration", "record"),
    MEMORY: ("step", "settings", "record"),
    "config.json": ("_name_or_path",),
    "tokenizer_config.json": ("name_or_path",),
}


@dataclass(frozen=True)
class Outward:
    """How a run's files name their inputs for others.

    Attributes:
        project: The run's project.
        recipe: The recipe, whose texts may be directories.
        local: Directory by which the recipe names the base; None if the base is from the hub.
        base: Hub id of the base; None if it is not known.
    """

    project: Path
    recipe: Mapping[str, object]
    local: str | None = None
    base: str | None = None

    def text(self, text: str) -> str:
        """Return a text for others."""
        if self.base and self.local and self.local.startswith(("/", "~", "..")):
            text = re.sub(rf"{re.escape(self.local)}(?![\w.-])", self.base, text)
        return without_paths(text, self.project, self.recipe)

    def model(self, name: object) -> str | None:
        """Return the hub id that a file gives as its base; for a directory, that of the run's base."""
        named = str(name or "").partition("@")[0]
        local = not HUB_ID.fullmatch(named) or named == self.local or (self.project / named).is_dir()
        return (self.base or "").partition("@")[0] or None if local else named

    def sent(self, path: str, file: Path) -> Path | bytes:
        """Return a file as it is sent: its own path, or its content if this differs."""
        name = Path(path).name
        if name == CARD:
            before = file.read_text("utf-8")
            after = re.sub(r"^- base_model:.*\n", "", before, flags=re.MULTILINE)  # tags that PEFT writes
            after = self.text(with_header(after, {"base_model": self.base}) if HEADER.match(after) else after)
            return file if after == before else after.encode()
        if name == BRICK:
            public = renamed(card := yamldoc.load(file).data, self.project)
            return file if public == card else yamldoc.dump(public, width=120).encode()
        if name != ADAPTER_CONFIG and name not in _FIELDS:
            return file
        content = jsondoc.read_object(file)
        changed: dict[str, Any] = {
            field: renamed(content[field], self.project) for field in _FIELDS.get(name, ()) if field in content
        }
        if name == ADAPTER_CONFIG:
            changed["base_model_name_or_path"] = self.model(content.get("base_model_name_or_path"))
        elif name == CONFIGURATION:
            base = changed["base"]["id"] if self.local is None or self.base is None else self.base
            # `path` is a directory of this machine; a name in its place is looked up on the hub.
            changed["base"] |= {"id": base, "path": base}
        if content.items() >= changed.items():
            return file
        return (json.dumps({**content, **changed}, indent=2, ensure_ascii=False) + "\n").encode()


def content_of(sent: Path | bytes) -> bytes:
    """Return the bytes of a file to send."""
    return sent if isinstance(sent, bytes) else sent.read_bytes()


def difference(path: str, own: Path, sent: Path | bytes) -> str | None:
    """Return a unified diff between a run's file and what is sent in its place; None if it is sent as it is."""
    if isinstance(sent, Path):
        return None
    before, after = own.read_text("utf-8").splitlines(), sent.decode().splitlines()
    return "\n".join(difflib.unified_diff(before, after, f"run/{path}", f"sent/{path}", lineterm="", n=1)) or None

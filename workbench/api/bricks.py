"""Bricks by what users type for them: a directory, or a name in bricks/."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.ground.errors import WorkbenchError, nearest

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick


def base_of_brick(brick: Brick) -> str:
    """Return the base that a brick names: a directory or hub id.

    Raises:
        WorkbenchError: If it names none.
    """
    from workbench.bricks.locate import base_of
    from workbench.run.route_statistics import card_folder

    return base_of(
        brick.path if brick.card is None else card_folder(brick),
        Path.cwd(),
        "Name the model that it was made on with --base DIR.",
    )


def brick_directory(name: str) -> Path:
    """Return a brick's directory, given the directory or its name in bricks/. A GGUF file is returned itself.

    Raises:
        WorkbenchError: If there is no such directory.
    """
    from workbench.ground.recognize import look

    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return Path(name)
    path = Path(name) if Path(name).is_dir() else Path("bricks") / name
    if not path.is_dir():
        known = [p.name for p in Path("bricks").iterdir() if p.is_dir()] if Path("bricks").is_dir() else []
        thing = look(Path(name))
        raise WorkbenchError(
            f"no brick '{name}': expected a directory, or a name in bricks/. {f'Found {thing.says}.' if thing else nearest(name, known)}",
            thing.hint if thing else "`workbench brick ls` lists all bricks.",
        )
    return path


def find_brick(name: str) -> Brick:
    """Open a brick, given its directory or its name in bricks/."""
    from workbench.bricks.locate import resolve_brick
    from workbench.steps.fields import BrickRef

    folder = brick_directory(name)
    return resolve_brick(folder.resolve().name, BrickRef(path=str(folder.resolve())), Path.cwd())

"""Saves of an interrupted training, and the check that they fit the current settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.files import json_digest, read_json, write_json
from workbench.weights.digests import meaning_of, tensor_digest

FOLDER = ".training"
_KEY = "key.json"
# transformers writes this file last, so a save without it is incomplete.
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Saves:
    """Saves of a training.

    Attributes:
        folder: Directory of the saves, or None if the training makes none.
        last: Save to resume from, or None.
    """

    folder: Path | None = None
    last: Path | None = None

    def remove(self) -> None:
        """Delete the saves, after the brick is written."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_saves(out: Path, key: str | None, notice: Callable[[str], None]) -> Saves:
    """Open the saves in a brick's directory, deleting those of other settings and incomplete ones.

    Args:
        out: The brick's directory.
        key: Digest of everything that determines the result. Saves with another key are deleted. None disables saves.
        notice: Callback for a message about deleted saves, or about the step that training resumes from.
    """
    folder = out / FOLDER
    if folder.is_dir() and (key is None or read_json(folder / _KEY) != {"key": key}):
        notice("the saves of an interrupted training are discarded: settings, data, base or libraries have changed")
        shutil.rmtree(folder)
    if key is None:
        return Saves()
    saves = {int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()}
    for step in [step for step, path in saves.items() if read_json(path / _STATE) is None]:
        shutil.rmtree(saves.pop(step))
    write_json(folder / _KEY, {"key": key})
    if not saves:
        return Saves(folder)
    last = max(saves)
    notice(f"resuming an interrupted training after step {last}")
    return Saves(folder, saves[last])


def model_digest(model: Any) -> str:
    """Return a digest of a live model: its class, its configuration and its tensors."""
    tensors = [[name, tensor_digest(tensor)] for name, tensor in model.state_dict().items()]
    return json_digest([type(model).__name__, meaning_of(model.config.to_dict()), tensors])

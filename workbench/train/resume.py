"""What an interrupted training leaves beside its brick, and when it still counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.files import json_digest, read_json, write_json
from workbench.weights.digests import tensor_digest

FOLDER = ".training"
_KEY = "key.json"
# transformers writes it last: a save without it was cut short.
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Saves:
    """The folder of a training's saves.

    Attributes:
        folder: Where they lie; None where none are made.
        last: The save that training goes on from.
    """

    folder: Path | None = None
    last: Path | None = None

    def remove(self) -> None:
        """Delete the folder: the brick is written."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_saves(out: Path, key: str | None, notice: Callable[[str], None]) -> Saves:
    """The saves below a brick's directory.

    Args:
        out: The brick's directory.
        key: Digest of all that decides the result; saves under another one are discarded. None: nothing is saved.
        notice: Is told what was discarded, or the step that training goes on from.
    """
    folder = out / FOLDER
    if folder.is_dir() and (key is None or read_json(folder / _KEY) != {"key": key}):
        notice("what an interrupted training left is discarded: settings, data, base or libraries have changed")
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
    notice(f"goes on after step {last}, where a training was interrupted")
    return Saves(folder, saves[last])


def model_digest(model: Any) -> str:
    """Digest of a live model's tensors."""
    return json_digest([[name, tensor_digest(tensor)] for name, tensor in model.state_dict().items()])

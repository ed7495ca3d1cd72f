"""The checkpoints of a training run: folders such as `checkpoint-500`, `step_500` or `iter_0000500` beside each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import ADAPTER, CONFIG, INDEX, SINGLE, fields_of

# transformers, TRL, axolotl and LLaMA-Factory write checkpoint-N; torchtune epoch_N and step_N; OLMo stepN-unsharded or stepN-hf; verl global_step_N; litgpt
# step-N; Megatron-Bridge's exports iter_N.
_NAME = re.compile(r"(checkpoint|ckpt|step|epoch|iter|global_?step)[-_]?(\d+)(?:-(?:unsharded|hf))?")
_ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a training run.

    Attributes:
        step: Its number: a step, or an epoch if the folders count epochs.
        path: Its folder.
        kind: "adapter" for PEFT's files, else "checkpoint".
        lacks: What is missing, for a checkpoint that was not written to its end.
    """

    step: int
    path: Path
    kind: Literal["adapter", "checkpoint"]
    lacks: str | None

    @property
    def nbytes(self) -> int:
        """Size of the weights, in bytes. What an optimizer keeps beside them is not counted, and never read."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    @property
    def day(self) -> str:
        """Day on which the weights were written, in UTC."""
        times = [file.stat().st_mtime for file in self.path.glob("*.safetensors")]
        return datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d")


def checkpoints_of(folder: Path, typed: str) -> list[Saved]:
    """Return the checkpoints in a folder, in the order of their steps.

    Args:
        folder: The folder that the trainer wrote to.
        typed: How the recipe names it, for errors.

    Raises:
        WorkbenchError: If there is no checkpoint, a step is there twice, or steps and epochs are mixed.
    """
    named = [(match, path) for path in sorted(folder.iterdir()) if path.is_dir() and (match := _NAME.fullmatch(path.name))]
    if not named:
        raise WorkbenchError(
            f"{typed} has no checkpoints of a training run: folders such as checkpoint-500, step_500 or epoch_2",
            f"`workbench open {typed}` says what it is. A single model is written `{{checkpoint: {typed}}}`.",
        )
    if len(kinds := sorted({"epoch" if match[1] == "epoch" else "step" for match, _ in named})) > 1:
        raise WorkbenchError(
            f"{typed} has folders of {kinds[0]}s and of {kinds[1]}s, so their order cannot be told",
            "Keep those of one kind there.",
        )
    steps = Counter(int(match[2]) for match, _ in named)
    if twice := [step for step, count in steps.items() if count > 1]:
        folders = ", ".join(path.name for match, path in named if int(match[2]) == twice[0])
        raise WorkbenchError(f"{typed} has step {twice[0]} twice: {folders}", "Remove one of them, or move it elsewhere.")
    traced = any((path / "trainer_state.json").is_file() for _, path in named)
    return sorted((_saved(int(match[2]), path, traced) for match, path in named), key=lambda one: one.step)


def _saved(step: int, path: Path, traced: bool) -> Saved:
    """Describe a checkpoint by its small files and the names of the others.

    Args:
        step: Its number.
        path: Its folder.
        traced: True if transformers' Trainer wrote the run: it writes trainer_state.json last.
    """
    if (path / ADAPTER).is_file():
        wanted = [_ADAPTER_FILE]
        kind: Literal["adapter", "checkpoint"] = "adapter"
    else:
        shards = fields_of(path / INDEX).get("weight_map")
        wanted = [CONFIG, *(sorted({*map(str, shards.values())}) if isinstance(shards, dict) else [SINGLE])]
        kind = "checkpoint"
    wanted += ["trainer_state.json"] if traced else []
    lacking = [name for name in wanted if not (path / name).is_file() or not (path / name).stat().st_size]
    return Saved(step, path, kind, lacking[0] if lacking else None)


def gaps(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of neighbors that are further apart than most, between which checkpoints are missing."""
    distances = [after - before for before, after in pairwise(steps)]
    usual = Counter(distances).most_common(1)[0][0] if distances else 0
    return [(steps[i], steps[i + 1]) for i, distance in enumerate(distances) if distance > usual]

"""The checkpoints of a training run: folders such as `checkpoint-500` or `step_500` beside each other, or revisions of a hub repository."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

from workbench.bricks.hub import revisions
from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import ADAPTER, CONFIG, INDEX, SINGLE, fields_of

# transformers, TRL, axolotl and LLaMA-Factory write checkpoint-N; torchtune epoch_N and step_N; OLMo stepN-unsharded or stepN-hf; verl global_step_N; litgpt
# step-N; Megatron-Bridge's exports iter_N. Of revisions: Pythia's are stepN, OLMo's stepN-tokensMB, OLMo 2's and SmolLM3's stageK-stepN-tokensMB and
# stageK-step-N; a Trainer that pushes every save names its commits "Training in progress, step N".
_NAME = re.compile(
    r"(?:stage\d+-|Training in progress, )?(checkpoint|ckpt|step|epoch|iter|global_?step)[-_ ]?(\d+)(?:-(?:unsharded|hf|tokens\d+[BT]))?"
)
_ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a training run.

    Attributes:
        step: Its number: a step, or an epoch if the names count epochs.
        name: Its folder's name, or its revision.
        place: Path or hub id, as a recipe names it.
        kind: "adapter" for PEFT's files, "checkpoint" for a model's; "path" for a revision, whose files tell it.
        lacks: What is missing, for a checkpoint that was not written to its end.
        nbytes: Size of the weights, in bytes; 0 for a revision. What an optimizer keeps beside them is not counted, and never read.
        day: Day on which the weights were written, in UTC; empty for a revision.
    """

    step: int
    name: str
    place: str
    kind: Literal["adapter", "checkpoint", "path"]
    lacks: str | None = None
    nbytes: int = 0
    day: str = ""


def checkpoints_of(folder: Path, typed: str) -> list[Saved]:
    """Return the checkpoints in a folder, in the order of their steps.

    Args:
        folder: The folder that the trainer wrote to.
        typed: How the recipe names it, for errors.

    Raises:
        WorkbenchError: If there is no checkpoint, a step is there twice, or steps and epochs are mixed.
    """
    steps = _steps([path.name for path in sorted(folder.iterdir()) if path.is_dir()], typed, "folders")
    traced = any((folder / name / "trainer_state.json").is_file() for name in steps)
    return [_saved(step, folder / name, traced) for name, step in steps.items()]


def revisions_of(repository: str, what: str) -> list[Saved]:
    """Return the checkpoints that a hub repository has as revisions, in the order of their steps.

    Args:
        repository: Hub id.
        what: Name of the brick, for errors.

    Raises:
        WorkbenchError: As `checkpoints_of`, or if the hub cannot be reached and has left nothing in its cache.
    """
    found = revisions(repository, what)
    refs = [(name, revision) for name, revision in found if name == revision]
    found = refs if any(_NAME.fullmatch(name) for name, _ in refs) else found
    steps = _steps([name for name, _ in found], repository, "revisions")
    return [Saved(step, name, f"{repository}@{dict(found)[name]}", "path") for name, step in steps.items()]


def _steps(names: Sequence[str], typed: str, kind: str) -> dict[str, int]:
    """Return the names of checkpoints among others, in the order of their steps, with their steps."""
    named = [match for name in names if (match := _NAME.fullmatch(name))]
    if not named:
        raise WorkbenchError(
            f"{typed} has no checkpoints of a training run: {kind} such as checkpoint-500, step_500 or epoch_2",
            f"`workbench open {typed}` says what it is. A single model is written `{{checkpoint: {typed}}}`.",
        )
    if len(units := sorted({"epoch" if match[1] == "epoch" else "step" for match in named})) > 1:
        raise WorkbenchError(
            f"{typed} has {kind} of {units[0]}s and of {units[1]}s, so their order cannot be told",
            "Keep those of one kind there." if kind == "folders" else "Name the checkpoints as bricks of their own.",
        )
    if twice := [step for step, count in Counter(int(match[2]) for match in named).items() if count > 1]:
        raise WorkbenchError(
            f"{typed} has step {twice[0]} twice: {', '.join(match[0] for match in named if int(match[2]) == twice[0])}",
            "Remove one of them, or move it elsewhere." if kind == "folders" else "Name the checkpoints as bricks of their own.",
        )
    return {match[0]: int(match[2]) for match in sorted(named, key=lambda one: int(one[2]))}


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
    weights = [file.stat() for file in path.glob("*.safetensors")]
    day = datetime.fromtimestamp(max((one.st_mtime for one in weights), default=0), UTC).strftime("%Y-%m-%d")
    return Saved(step, path.name, str(path), kind, lacking[0] if lacking else None, sum(one.st_size for one in weights), day)


def gaps(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of neighbors that are further apart than most, between which checkpoints are missing."""
    distances = [after - before for before, after in pairwise(steps)]
    usual = Counter(distances).most_common(1)[0][0] if distances else 0
    return [(steps[i], steps[i + 1]) for i, distance in enumerate(distances) if distance > usual]

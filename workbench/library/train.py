"""`brick train`: from a train.yaml to a brick with its card."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import yamldoc
from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.brick import STARTER, Brick
from workbench.bricks.card import BaseRecord, BrickCard, Score, read_title, write_card
from workbench.bricks.locate import kinds_of, resolve_base, resolve_brick
from workbench.errors import WorkbenchError, nearest, shell
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.plans import plans
from workbench.evaluate.score import score_all
from workbench.events import Events, no_events
from workbench.project import CACHE, find_project
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.scores.store import ScoreStore
from workbench.scores.suite import Suite
from workbench.steps.fields import NAME, BrickRef
from workbench.train import TrainSpec, reports, train
from workbench.weights.digests import tensor_digests, weights_digest

if TYPE_CHECKING:
    import torch

CHECKPOINT = "checkpoint"


class BrickSpec(TrainSpec):
    """A whole train.yaml: how a brick is trained, and what its card says that no measurement can."""

    base: str = STARTER
    """Directory or hub id of the base, relative to the project."""
    skill: str = ""
    """What the brick teaches, in a line."""
    prompt_format: str = ""
    """How its prompts look."""
    generator: str | None = None
    """What made its items."""
    licence: str | None = None
    """Licence of weights and items."""
    task: str | None = None
    """lm-eval task, of evals/tasks, that scores the brick alone after training."""

    def settings(self) -> TrainSpec:
        """The part that the trainer reads, and that the training record repeats."""
        return TrainSpec(**self.model_dump(include=set(TrainSpec.model_fields)))


def write_spec(folder: Path, settings: dict[str, Any]) -> None:
    """Write a new brick's train.yaml; one that says the same already is left as it is.

    Args:
        folder: The brick's directory; made where it is not there.
        settings: Fields of `BrickSpec`; `data`, `held_out` and `orthogonal_to` may name files and directories from the current one.

    Errors: no such data, base or other brick, bad settings, a name that no brick can have, another train.yaml.
    """
    file, project = folder / "train.yaml", find_project(folder / "train.yaml")
    if not re.fullmatch(NAME, folder.resolve().name):
        raise WorkbenchError(f"{folder}: a brick's name is lower-case letters, digits and . _ -", "Call it differently.", 2)
    found = dict(settings)
    if isinstance(found.get("base"), str) and not (project / found["base"]).is_dir() and Path(found["base"]).is_dir():
        found["base"] = str(Path(found["base"]).absolute())
    for name in ("data", "held_out"):
        if isinstance(found.get(name), str):
            if not Path(found[name]).is_file():
                raise WorkbenchError(f"--{name.replace('_', '-')}: no such file: {found[name]}", "A jsonl of training rows.", 2)
            found[name] = _from(folder, found[name])
    if found.get("orthogonal_to"):
        found["orthogonal_to"] = [_from(folder, n) if Path(n).is_dir() else n for n in found["orthogonal_to"]]
    text = yamldoc.dump(found)
    spec = yamldoc.parse(text, str(file)).validate(BrickSpec)
    if file.is_file():
        if yamldoc.load(file).validate(BrickSpec) != spec:
            raise WorkbenchError(
                f"{file} stands already, and the flags say something else",
                f"Change it there and run `workbench brick train {shell(folder)}` without flags, or name a new brick.",
                2,
            )
        return
    resolve_base(spec.base, project)
    _others(spec, folder, project)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# workbench brick train {shell(folder.resolve().name)}\n{text}", "utf-8")


def _from(folder: Path, name: str) -> str:
    """A path as seen from a brick's directory."""
    return Path(os.path.relpath(Path(name).resolve(), folder.resolve())).as_posix()


def train_brick(folder: Path, device: torch.device, *, score: bool = True, events: Events = no_events) -> BrickCard:
    """Train the brick of a folder and write its card. Goes on where a training with the same settings was interrupted.

    Args:
        folder: Holds train.yaml and its data; takes the adapter, or `checkpoint/` for a full fine-tune, and brick.yaml.
        device: Where to train and score.
        score: Score brick and base on the spec's task.

    Errors: no train.yaml, bad settings or data, missing base, other bricks that are missing or no LoRA adapters.
    """
    if not (folder / "train.yaml").is_file():
        raise WorkbenchError(
            f"{folder}: no train.yaml",
            "Settings of a brick stand there: see bricks/add/train.yaml; `--data ROWS.jsonl` writes one.",
        )
    spec = yamldoc.load(folder / "train.yaml").validate(BrickSpec)
    project = find_project(folder / "train.yaml")
    checkpoint, _ = resolve_base(spec.base, project)
    digest = weights_digest(checkpoint.specs, tensor_digests(checkpoint.entries, project / CACHE), checkpoint.config)
    name = folder.resolve().name
    files = folder / CHECKPOINT if spec.method == "full" else folder

    progress, notice = reports(events, name)
    notice(f"{spec.steps} steps of {spec.batch_size} rows on {device}")
    record = train(
        spec.settings(), base=checkpoint.path, data=folder / spec.data if isinstance(spec.data, str) else folder, out=files,
        device=str(device), progress=progress, notice=notice, folder=folder, others=_others(spec, folder, project),
        declared=spec.base)  # fmt: skip
    brick = Brick(name, (kinds_of(files) or ["adapter"])[0], files)
    card = BrickCard(
        version=1, name=name, kind="checkpoint" if spec.method == "full" else "adapter", skill=spec.skill,
        base=BaseRecord(id=spec.base, title=read_title(checkpoint.path) or spec.base, digest=digest),
        files=CHECKPOINT if spec.method == "full" else ".", digest=brick.digest(None), prompt_format=spec.prompt_format,
        generator=spec.generator, licence=spec.licence, training=record)  # fmt: skip
    write_card(folder, card)
    if score and spec.task:
        card = card.model_copy(update={"scores": (score_brick(folder, spec, project, device, events),)})
        write_card(folder, card)
    return card


def _others(spec: BrickSpec, folder: Path, project: Path) -> dict[str, Path]:
    """The adapters of `orthogonal_to`, by the names given there. Errors: missing, the brick itself, no adapter."""
    found = {}
    for name in spec.orthogonal_to:
        path = next((p for p in (folder / name, folder.parent / name, project / "bricks" / name) if p.is_dir()), None)
        if path is None:
            known = [p.parent.name for p in folder.resolve().parent.glob(f"*/{ADAPTER_CONFIG}") if p.parent != folder.resolve()]
            raise WorkbenchError(f"orthogonal_to: no brick '{name}' in {folder.parent}", nearest(name, known), 2)
        if path.resolve() == folder.resolve():
            raise WorkbenchError(f"orthogonal_to: '{name}' is the brick that is trained", "Name other bricks.", 2)
        brick = resolve_brick(path.resolve().name, BrickRef(path=str(path.resolve())), project)
        if brick.kind != "adapter":
            raise WorkbenchError(
                f"orthogonal_to: brick '{name}' is a {brick.kind}, expected a LoRA adapter",
                "`workbench brick extract` makes an adapter of a checkpoint.",
                2,
            )
        found[name] = brick.path
    return found


def score_brick(folder: Path, spec: BrickSpec, project: Path, device: torch.device, events: Events) -> Score:
    """The brick's and the base's score on the brick's task, all of its items."""
    assert spec.task
    reference = str(folder.resolve().relative_to(project)) if folder.resolve().is_relative_to(project) else str(folder.resolve())
    name = folder.resolve().name
    data = {"version": 1, "base": spec.base, "bricks": {name: reference}}
    alone = from_data({**data, "name": name, "steps": [{"merge": "task_arithmetic"}]}, project)
    base = from_data({"version": 1, "base": spec.base, "name": "base"}, project)
    entries = [LineupEntry("base", "base", resolve(base)), LineupEntry(name, "brick", resolve(alone))]
    suite = Suite(suite=f"brick-{name}", tasks=(spec.task,))
    found = plans(entries, [suite], batch_size=32, limit=None)
    before, after = score_all(entries, found, ScoreStore(project / "runs" / "scores"), device=device, events=events)
    metric = found[0].primary(spec.task)
    result = after.tasks[spec.task]
    value = result.metrics[metric]
    return Score(task=spec.task, metric=metric, n=result.n, value=value.value, low=value.low, high=value.high,
                 base_value=before.tasks[spec.task].metrics[metric].value)  # fmt: skip

"""`brick train`: from a train.yaml to a brick with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench import yamldoc
from workbench.bricks import STARTER, BaseRecord, Brick, BrickCard, Score, kinds_of, read_title, resolve_base, write_card
from workbench.controls import Entry, plans
from workbench.errors import WorkbenchError
from workbench.livemodels import Events, no_events
from workbench.recipe import find_project, from_data
from workbench.resolve import resolve
from workbench.scores import Store
from workbench.scoring import score_all
from workbench.standins import CACHE
from workbench.suites import Suite
from workbench.train import TrainSpec, train
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


def train_brick(folder: Path, device: torch.device, *, score: bool = True, events: Events = no_events) -> BrickCard:
    """Train the brick of a folder and write its card.

    Args:
        folder: Holds train.yaml and its data; takes the adapter, or `checkpoint/` for a full fine-tune, and brick.yaml.
        device: Where to train and score.
        score: Score brick and base on the spec's task.

    Errors: no train.yaml, bad settings or data, missing base.
    """
    if not (folder / "train.yaml").is_file():
        raise WorkbenchError(f"{folder}: no train.yaml", "Settings of a brick stand there: see bricks/add/train.yaml.")
    spec = yamldoc.load(folder / "train.yaml").validate(BrickSpec)
    project = find_project(folder / "train.yaml")
    checkpoint, _ = resolve_base(spec.base, project)
    digest = weights_digest(checkpoint.specs, tensor_digests(checkpoint.entries, project / CACHE), checkpoint.config)
    name = folder.resolve().name
    files = folder / CHECKPOINT if spec.method == "full" else folder

    def progress(step: int, steps: int, loss: float) -> None:
        events({"stage": "train", "step": name, "done": step, "total": steps, "text": f"loss {loss:.3f}"})

    events({"stage": "train", "step": name, "text": f"{spec.steps} steps of {spec.batch_size} rows on {device}"})
    record = train(
        spec.settings(), base=checkpoint.path, data=folder / spec.data, out=files, device=str(device), progress=progress
    )
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


def score_brick(folder: Path, spec: BrickSpec, project: Path, device: torch.device, events: Events) -> Score:
    """The brick's and the base's score on the brick's task, all of its items."""
    assert spec.task
    reference = str(folder.resolve().relative_to(project)) if folder.resolve().is_relative_to(project) else str(folder.resolve())
    name = folder.resolve().name
    data = {"version": 1, "base": spec.base, "bricks": {name: reference}}
    alone = from_data({**data, "name": name, "steps": [{"merge": "task_arithmetic"}]}, project)
    base = from_data({"version": 1, "base": spec.base, "name": "base"}, project)
    entries = [Entry("base", "base", resolve(base)), Entry(name, "brick", resolve(alone))]
    suite = Suite(suite=f"brick-{name}", tasks=(spec.task,))
    found = plans(entries, [suite], batch_size=32, limit=None)
    before, after = score_all(entries, found, Store(project / "runs" / "scores"), device=device, events=events)
    metric = found[0].primary(spec.task)
    result = after.tasks[spec.task]
    value = result.metrics[metric]
    return Score(task=spec.task, metric=metric, n=result.n, value=value.value, low=value.low, high=value.high,
                 base_value=before.tasks[spec.task].metrics[metric].value)  # fmt: skip

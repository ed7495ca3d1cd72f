"""`brick train`: training a brick by the settings in train.yaml, and writing its card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.brick import STARTER, Brick
from workbench.bricks.card import BaseRecord, BrickCard, RoutingStatistics, Score, read_title, write_card
from workbench.bricks.locate import kinds_of, resolve_base, resolve_brick
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.plans import plans
from workbench.evaluate.scoring import score_all
from workbench.ground import yamldoc
from workbench.ground.errors import InvalidRecipeError, UsageError, WorkbenchError, nearest, shell
from workbench.ground.events import Events, no_events
from workbench.ground.files import write_text
from workbench.ground.project import cache_of, find_project, runs_of
from workbench.models.texts import read_prompts
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.route_statistics import measured, trained_on
from workbench.scores.store import ScoreStore
from workbench.scores.suite import Suite
from workbench.steps.fields import NAME, BrickRef
from workbench.train.fit import reports
from workbench.train.run import TrainFiles, train
from workbench.train.spec import TrainSpec
from workbench.train.texts import training_texts
from workbench.weights.digests import tensor_digests, weights_digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from workbench.weights.checkpoint import Checkpoint

CHECKPOINT = "checkpoint"


class BrickSpec(TrainSpec):
    """The content of train.yaml: settings of the training, and descriptions for the brick's card."""

    base: str = STARTER
    """Directory of the base, relative to the project, or its hub id."""
    skill: str = ""
    """One line that describes the skill that the brick adds."""
    prompt_format: str = ""
    """Format of the brick's prompts."""
    generator: str | None = None
    """Program that generated the training data."""
    licence: str | None = None
    """License of the weights and of the training data."""
    task: str | None = None
    """lm-eval task in evals/tasks that scores the brick alone after training."""

    def settings(self) -> TrainSpec:
        """Return the settings of the training, without the descriptions."""
        return self.alone()


def write_spec(folder: Path, settings: Mapping[str, object]) -> None:
    """Write the train.yaml of a new brick, unless an equal one exists.

    Args:
        folder: Directory of the brick, created if necessary.
        settings: Fields of `BrickSpec`. File names in `data`, `held_out` and `orthogonal_to` are relative to the current
            directory.

    Raises:
        WorkbenchError: If the data, the base or another brick does not exist, a row, a setting or the brick's name is invalid,
            or another train.yaml exists.
    """
    file, project = folder / "train.yaml", find_project(folder / "train.yaml")
    if not re.fullmatch(NAME, folder.resolve().name):
        raise UsageError(f"{folder}: a brick's name must consist of lower-case letters, digits and . _ -", "Choose another name.")
    fields = dict(settings)
    if isinstance(base := fields.get("base"), str) and not (project / base).is_dir() and Path(base).is_dir():
        fields["base"] = str(Path(base).absolute())
    rows: dict[str, str] = {}
    for name in ("data", "held_out"):
        if isinstance(rows_file := fields.get(name), str):
            rows[name] = str(Path(rows_file).resolve())
            if not Path(rows_file).is_file():
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag}: no such file: {rows_file}", "Expected a jsonl file of training rows.")
            fields[name] = _from(folder, rows_file)
    if isinstance(others := fields.get("orthogonal_to"), list):
        fields["orthogonal_to"] = [_from(folder, n) if Path(n).is_dir() else n for n in others]
    text = yamldoc.dump(fields)
    spec = yamldoc.parse(text, str(file)).validate(BrickSpec)
    if file.is_file():
        if yamldoc.load(file).validate(BrickSpec) != spec:
            raise UsageError(
                f"{file} exists already, with other settings than the flags",
                f"Edit that file and run `workbench brick train {shell(folder)}` without flags, or choose a new brick.",
            )
        return
    resolve_base(spec.base, project)
    _others(spec, folder, project)
    if "data" in rows:  # a file with a bad row leaves no train.yaml behind
        training_texts(spec.settings().model_copy(update=rows), Path(rows["data"]), folder)
    write_text(file, f"# workbench brick train {shell(folder.resolve().name)}\n{text}")


def _from(folder: Path, name: str) -> str:
    """Return a path relative to a brick's directory."""
    return Path(os.path.relpath(Path(name).resolve(), folder.resolve())).as_posix()


def train_brick(folder: Path, device: torch.device, *, score: bool = True, events: Events = no_events) -> BrickCard:
    """Train the brick in a folder and write its card. An interrupted training with the same settings resumes.

    Args:
        folder: Directory with train.yaml and its data. The adapter, or `checkpoint/` for a full fine-tune, and brick.yaml are
            written there.
        device: Device for training and scoring.
        score: Whether to score the brick and the base on the task in train.yaml.
        events: Callback that receives progress events.

    Raises:
        WorkbenchError: If train.yaml is missing, its settings or data are invalid, the base is missing, or a brick in
            `orthogonal_to` is missing or not a LoRA adapter.
    """
    if not (folder / "train.yaml").is_file():
        raise WorkbenchError(
            f"{folder}: no train.yaml",
            "Write the settings of the brick there (see bricks/add/train.yaml), or let `--data ROWS.jsonl` write the file.",
        )
    spec = yamldoc.load(folder / "train.yaml").validate(BrickSpec)
    project = find_project(folder / "train.yaml")
    checkpoint, _ = resolve_base(spec.base, project)
    digest = weights_digest(checkpoint.specs, tensor_digests(checkpoint.entries, cache_of(project)), checkpoint.config)
    name = folder.resolve().name
    files = folder / CHECKPOINT if spec.method == "full" else folder

    record = train(
        spec.settings(),
        TrainFiles(
            base=checkpoint.path,
            data=folder / spec.data if isinstance(spec.data, str) else folder,
            out=files,
            folder=folder,
            others=_others(spec, folder, project),
            declared=spec.base,
        ),
        device=str(device),
        model=_unpacked(checkpoint, spec, device) if checkpoint.packed else None,
        callbacks=reports(events, name),
    )
    brick = Brick(name, (kinds_of(files) or ["adapter"])[0], files)
    card = BrickCard(
        version=1,
        name=name,
        kind="checkpoint" if spec.method == "full" else "adapter",
        skill=spec.skill,
        base=BaseRecord(id=spec.base, title=read_title(checkpoint.path) or spec.base, digest=digest),
        files=CHECKPOINT if spec.method == "full" else ".",
        digest=brick.digest(None),
        prompt_format=spec.prompt_format,
        generator=spec.generator,
        licence=spec.licence,
        training=record,
    )
    write_card(folder, card)
    if spec.method == "lora":
        card = card.model_copy(update={"routing": _statistics(folder, card, checkpoint, device, events)})
        write_card(folder, card)
    if score and spec.task:
        card = card.model_copy(update={"scores": (score_brick(folder, spec, project, device, events),)})
        write_card(folder, card)
    return card


def _unpacked(checkpoint: Checkpoint, spec: BrickSpec, device: torch.device) -> PreTrainedModel:
    """Return the live model of a base whose weights transformers would not load as they are read here."""
    from workbench.models.layout import Model
    from workbench.models.live import compute, live_model

    base = Model(checkpoint, checkpoint.config)
    return live_model(base.config, compute(base, spec.weights_dtype, device), checkpoint.path, device)


def _statistics(
    folder: Path, card: BrickCard, base: Checkpoint, device: torch.device, events: Events
) -> RoutingStatistics | None:
    """Return the statistics that routers need, measured on training prompts; None, with a notice, if there are no such prompts."""
    try:
        what = trained_on(folder, card)
        prompts = read_prompts(what.file, what.label, what.samples, least=4)
    except WorkbenchError as error:
        reports(events, card.name).notice(f"no routing statistics on the card: {error.message}")
        return None
    return measured(folder, base, prompts, what, device, events)


def _others(spec: BrickSpec, folder: Path, project: Path) -> dict[str, Path]:
    """Return the directories of the adapters in `orthogonal_to` by name; raise WorkbenchError for an invalid one."""
    paths = {}
    for name in spec.orthogonal_to:
        path = next((p for p in (folder / name, folder.parent / name, project / "bricks" / name) if p.is_dir()), None)
        if path is None:
            known = [p.parent.name for p in folder.resolve().parent.glob(f"*/{ADAPTER_CONFIG}") if p.parent != folder.resolve()]
            raise InvalidRecipeError(f"orthogonal_to: no brick '{name}' in {folder.parent}", nearest(name, known))
        if path.resolve() == folder.resolve():
            raise InvalidRecipeError(f"orthogonal_to: '{name}' is the brick being trained", "List other bricks.")
        brick = resolve_brick(path.resolve().name, BrickRef(path=str(path.resolve())), project)
        if brick.kind != "adapter":
            raise InvalidRecipeError(
                f"orthogonal_to: brick '{name}' is a {brick.kind}, expected a LoRA adapter",
                "`workbench brick extract` converts a checkpoint to an adapter.",
            )
        paths[name] = brick.path
    return paths


def score_brick(folder: Path, spec: BrickSpec, project: Path, device: torch.device, events: Events) -> Score:
    """Return the scores of the brick and the base on the brick's task, with all of its items."""
    assert spec.task
    reference = str(folder.resolve().relative_to(project)) if folder.resolve().is_relative_to(project) else str(folder.resolve())
    name = folder.resolve().name
    data = {"version": 1, "base": spec.base, "bricks": {name: reference}}
    alone = from_data({**data, "name": name, "steps": [{"merge": "task_arithmetic"}]}, project)
    base = from_data({"version": 1, "base": spec.base, "name": "base"}, project)
    entries = [LineupEntry("base", "base", resolve(base)), LineupEntry(name, "brick", resolve(alone))]
    suite = Suite(suite=f"brick-{name}", tasks=(spec.task,))
    scoring = plans(entries, [suite], batch_size=32, limit=None)
    before, after = score_all(entries, scoring, ScoreStore(runs_of(project) / "scores"), device=device, events=events)
    metric = scoring[0].primary(spec.task)
    result = after.tasks[spec.task]
    value = result.metrics[metric]
    return Score(
        task=spec.task,
        metric=metric,
        n=result.n,
        value=value.value,
        low=value.low,
        high=value.high,
        base_value=before.tasks[spec.task].metrics[metric].value,
    )

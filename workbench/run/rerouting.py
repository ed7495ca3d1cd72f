"""Add bricks to a routed configuration and remove them, in place: the router is fitted again on the states that it keeps.

The result is that of `run` with the other bricks, to the order of sums: prompts, copies and folds of a brick do not depend on the others.
A reader finds the earlier router or the new one: routing.json, which names the files of tensors, is written after them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.adapters.linear import linear_factors
from workbench.bricks.brick import Brick
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.ground.files import json_digest
from workbench.ground.holding import held
from workbench.ground.lazy import torch
from workbench.ground.manifest import changing, is_sealed, read_manifest, require_whole
from workbench.ground.results import JsonObject, Number, Result
from workbench.models.identity import tokenizer_digest
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.skeleton import causal_skeleton
from workbench.models.texts import read_prompts
from workbench.resolve.resolved import Resolved
from workbench.route.deciding.pooling import PooledRoute, PooledRouter, states_of_texts
from workbench.route.deciding.samples import Samples
from workbench.route.mixing.kernel import check_places
from workbench.run.compose import compose
from workbench.run.opened import open_configuration
from workbench.run.route_statistics import Measuring, known_statistics
from workbench.run.routers import (
    ADAPTERS,
    RECORD,
    RouterChange,
    RouterRecord,
    SavedRouter,
    brick_rows,
    calibration_rows,
    copy_adapter,
    put_router,
)
from workbench.steps.fields import NAME
from workbench.weights.device import exact
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from torch import Tensor


_TENSORS = re.compile(r"(router|calibration)(-[0-9a-f]{8})?\.safetensors")


@dataclass(frozen=True)
class Change:
    """What is done to a configuration.

    Attributes:
        action: What is done.
        brick: Name of the brick.
        digest: Digest of its content.
        files: Directory of its adapter.
    """

    action: Literal["add", "rm"]
    brick: str
    digest: str | None
    files: Path


@dataclass(frozen=True)
class NewBrick:
    """A brick to add.

    Attributes:
        brick: The adapter.
        calibration: Its prompts.
        description: A line that says what it does.
    """

    brick: Brick
    calibration: Measuring
    description: str | None = None


def add_brick(path: Path, new: NewBrick, device: torch.device, events: Events = no_events) -> RouterChange:
    """Add a brick to a routed configuration.

    Its card's statistics give the states of its prompts, if they are of the router's base; otherwise the base runs over them.

    Args:
        path: Directory of the configuration.
        new: The brick, which comes last among the bricks.
        device: Device to run the base on.
        events: Receives progress.

    Raises:
        WorkbenchError: If the configuration or its base is not as it was written, the router keeps no states, it has a brick of this
            name, the brick does not fit the base, or its file has fewer than four different prompts.
    """
    resolved, saved = _opened(path)
    name, what = new.brick.name, new.calibration
    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"'{name}': a brick's name must consist of lower-case letters, digits and . _ -", f"NAME={new.brick.path}"
        )
    if name in saved.bricks:
        raise UsageError(
            f"{path}: the router has a brick '{name}' already", f"Give the new one another name: NAME={new.brick.path}"
        )
    check_places(causal_skeleton(resolved.base.config, torch.device("cpu")), {name: linear_factors(new.brick.adapter)})
    prompts = read_prompts(what.file, what.label, what.samples, least=4)
    part = Samples.of_brick(name, prompts)
    encoder = _router(saved).encoder
    states = _states(new.brick, part.texts, resolved, saved, device, events)
    samples = _samples(saved).added(part.with_features(states, encoder(part.texts) if encoder else None))
    record = saved.record
    rows = brick_rows({name: new.brick.adapter}, {name: new.description} if new.description else {})
    bricks = {**_bricks(record.step), name: {"calibration": what.label, "description": new.description}}
    changed = record.model_copy(
        update={
            "bricks": [*record.bricks, *rows],
            "calibration": [*record.calibration, *calibration_rows({name: prompts}, lambda _name: [what.label])],
            "step": {**record.step, "bricks": bricks},
        }
    )
    return _rewrite(path, saved, samples, changed, Change("add", name, rows[0].digest, new.brick.path), events)


def remove_brick(path: Path, name: str, events: Events = no_events) -> RouterChange:
    """Remove a brick from a routed configuration, with its adapter.

    Raises:
        WorkbenchError: If the configuration is not as it was written, the router keeps no states, or it has no such brick, or two
            bricks alone.
    """
    _, saved = _opened(path)
    if name not in saved.bricks:
        raise UsageError(f"{path}: the router has no brick '{name}'", f"Its bricks are {', '.join(saved.bricks)}.")
    if len(saved.bricks) == 2:
        raise UsageError(
            f"{path}: without '{name}' there is one brick, and nothing to choose among",
            "Merge the brick that is left: `merge: linear` in a recipe.",
        )
    record = saved.record
    digest = next(row.digest for row in record.bricks if row.name == name)
    bricks = {key: value for key, value in _bricks(record.step).items() if key != name}
    changed = record.model_copy(
        update={
            "bricks": [row for row in record.bricks if row.name != name],
            "calibration": [row for row in record.calibration if row.name != name],
            "step": {**record.step, "bricks": bricks},
        }
    )
    samples = _samples(saved).removed(name)
    return _rewrite(path, saved, samples, changed, Change("rm", name, digest, path / ADAPTERS / name), events)


class ListedBrick(JsonObject):
    """A brick of a router."""

    name: str
    """Name of the brick."""
    prompts: int | None
    """Number of its calibration prompts."""
    right: Number | None
    """Share of them that has its brick (or one tied with it) on top, by routers that were fitted without their template."""
    tied: tuple[str, ...]
    """Bricks that its prompts are confused with."""
    description: str | None
    """A line that says what it does."""


class ListedRouter(Result):
    """A router, as `route ls` shows it."""

    method: str
    """Method of the router."""
    threshold: Number | None
    """Smallest confidence with which a prompt goes to a brick."""
    bricks: list[ListedBrick]
    """The bricks, in the router's order."""
    changes: list[RouterChange]
    """What was added and removed since the recipe's fit."""


def listed(path: Path) -> ListedRouter:
    """Return the bricks of a routed configuration.

    Raises:
        WorkbenchError: If the directory has no router, or it is not as it was written.
    """
    require_whole(path)
    saved = SavedRouter(path)
    record, fit = saved.record, saved.record.record
    prompts, accuracy = fit.get("prompts"), fit.get("accuracy")
    right = accuracy.get("by_brick") if isinstance(accuracy, dict) else None
    tied = {name: tuple(other for other in group if other != name) for group in saved.ties for name in group}
    bricks = [
        ListedBrick(
            name=row.name,
            prompts=prompts.get(row.name) if isinstance(prompts, dict) else None,
            right=right.get(row.name) if isinstance(right, dict) else None,
            tied=tied.get(row.name, ()),
            description=row.description if "description" in row.model_fields_set else None,
        )
        for row in record.bricks
    ]
    return ListedRouter(method=record.method, threshold=record.threshold, bricks=bricks, changes=record.changes)


def _opened(path: Path) -> tuple[Resolved, SavedRouter]:
    """Open a routed configuration whose router keeps the states that it was fitted on."""
    resolved, saved = open_configuration(path), SavedRouter(path)
    if not saved.record.states:
        says = "was fitted by a version that kept none" if issubclass(saved.kind, PooledRoute) else "reads none"
        raise WorkbenchError(
            f"{path}: its router has no states to be fitted on again: `{saved.record.method}` {says}",
            "Change the recipe's bricks, and run it again: `workbench run RECIPE`.",
        )
    _sweep(path, saved)
    return resolved, saved


def _bricks(step: Mapping[str, object]) -> dict[str, object]:
    """Return the bricks that a route step names, with their fields."""
    bricks = step.get("bricks")
    return dict(bricks) if isinstance(bricks, dict) else {}


def _router(saved: SavedRouter) -> PooledRouter:
    """Return the router as it is."""
    assert isinstance(saved.router, PooledRouter)
    return saved.router


def _samples(saved: SavedRouter) -> Samples:
    """Return the samples that the router was fitted on."""
    return Samples.read(saved.states(), tuple(saved.bricks))


def _states(
    brick: Brick, texts: Sequence[str], resolved: Resolved, saved: SavedRouter, device: torch.device, events: Events
) -> Tensor:
    """Return the states of a brick's prompts and copies: from its card, or from the base."""
    record, tokenizer = saved.record, resolved.tokenizer_path
    assert record.layer is not None
    known = known_statistics(brick, record.solved_on, tokenizer_digest(tokenizer), partial(_say, events))
    if known is not None and known.differs(record.layer, record.window) is None and (states := known.of(texts)) is not None:
        return states
    _say(events, f"{brick.name}: {len(texts)} prompts and copies through {record.layer} blocks on {device}")
    with exact(device):
        model = compose(resolved, device, events).model
        tensors = compute(model, resolved.dtype, device)
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        solved_on = weights_digest(output_specs(model.weights.specs, resolved.dtype), digests, model.config)
        if solved_on != record.solved_on:
            raise WorkbenchError(
                f"the weights are not those that the router was fitted on (digest {solved_on[:10]}, recorded {record.solved_on[:10]})",
                "Run the recipe again.",
            )
        live = live_model(model.config, tensors, tokenizer, device)
        return states_of_texts(live, load_tokenizer(tokenizer), texts, record.layer)


def _rewrite(
    path: Path, saved: SavedRouter, samples: Samples, record: RouterRecord, change: Change, events: Events
) -> RouterChange:
    """Fit the router of other samples, and write it, alone; the folder that seals the configuration is sealed again."""
    step = saved.kind.model_validate(record.step)
    assert isinstance(step, PooledRoute)
    assert record.layer is not None
    router = step.fitted(samples, record.layer, partial(_say, events), _router(saved).encoder)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    told = RouterChange(action=change.action, brick=change.brick, digest=change.digest, time=time, threshold=router.threshold)
    mark = f"-{json_digest([saved.digest, change.action, change.brick, change.digest])[:8]}"
    old = [name for name in (saved.record.file, saved.record.states_file) if (path / name).is_file()]
    folder = path / ADAPTERS / change.brick
    adapter = [f"{ADAPTERS}/{change.brick}/{file.name}" for file in change.files.iterdir() if file.is_file()]
    names = [RECORD, *old, f"router{mark}.safetensors", f"calibration{mark}.safetensors", *adapter]
    with _writing(path, saved, names):
        if change.action == "add":
            copy_adapter(change.files, folder)
        put_router(path, router, record.model_copy(update={"changes": [*record.changes, told]}), mark)
        for name in old:  # after the record, which names the new ones
            (path / name).unlink()
        if change.action == "rm":
            shutil.rmtree(folder)
    return told


@contextmanager
def _writing(path: Path, saved: SavedRouter, names: Sequence[str]) -> Iterator[None]:
    """Change files of a configuration alone in a `with` block; the folder that seals it is sealed again."""
    sealed = _sealed(path)
    inside = path.relative_to(sealed)
    with held(path / ".lock", path, "is changing this configuration", "Wait for it, then try again."):
        if SavedRouter(path).digest != saved.digest:
            raise WorkbenchError(f"{path}: another process has changed this configuration", "Run the command again.")
        with changing(sealed, [str(inside / name) for name in names]):
            yield


def _sealed(path: Path) -> Path:
    """Return the folder whose manifest lists the files of a configuration: its own, or that of the run around it."""
    return next((place for place in (path, path.parent) if is_sealed(place)), path)


def _sweep(path: Path, saved: SavedRouter) -> None:
    """Finish what an earlier change that was cut off has left: its own files alone, and a manifest that is open."""
    record, manifest = saved.record, read_manifest(_sealed(path))
    tensors = [file.name for file in path.iterdir() if _TENSORS.fullmatch(file.name)]
    files = [name for name in tensors if name not in (record.file, record.states_file)]
    gone = dict.fromkeys(change.brick for change in record.changes if change.action == "rm" and change.brick not in saved.bricks)
    folders = [place for name in gone if (place := path / ADAPTERS / name).is_dir()]
    if files or folders or (manifest and manifest.open):
        with _writing(path, saved, [*files, *(str(file.relative_to(path)) for folder in folders for file in folder.iterdir())]):
            for name in files:
                (path / name).unlink()
            for folder in folders:
                shutil.rmtree(folder)


def _say(events: Events, text: str) -> None:
    events({"stage": "route", "text": text})

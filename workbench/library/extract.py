"""Checkpoint to adapter and back: a fine-tune's delta as a LoRA with its error, an adapter baked into a checkpoint."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from workbench import jsondoc
from workbench.adapters.approximate import AdaptedWeights, Policy
from workbench.adapters.export import write_result
from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.brick import Brick, fitted
from workbench.bricks.card import BaseRecord, BrickCard, read_card, read_licence, read_title, write_card
from workbench.bricks.hub import CARD
from workbench.bricks.integers import check_integers
from workbench.bricks.locate import kinds_of, locate, resolve_base
from workbench.errors import WorkbenchError, shell
from workbench.events import Events, no_events
from workbench.files import publish, write_json
from workbench.models.layout import Model
from workbench.project import CACHE
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.execute import execute
from workbench.weights.device import exact
from workbench.weights.digests import tensor_digests, weights_digest
from workbench.weights.parallel import default_threads

RECORD = "extract.json"


def extract(
    checkpoint: str,
    base: str,
    out: Path,
    policy: Policy,
    *,
    project: Path,
    device: torch.device,
    threads: int | None = None,
    events: Events = no_events,
) -> dict[str, Any]:
    """A fine-tune's difference from its base as a PEFT adapter with a card. Tensor by tensor: memory is a few times the largest.

    Args:
        checkpoint: Directory or hub id of the fine-tune.
        base: Of the model that it was tuned from.
        out: A new directory; there whole or not at all.
        policy: Ranks, and what becomes of weights that are no linear layer's.
        project: Where relative paths start.
        device: Where the decompositions are computed.
        threads: Tensors at a time; omitted: one a core, at most 8.
        events: Told what happens.

    Returns:
        The record, as `extract.json` keeps it. Errors: an adapter, another architecture, nothing differs, `out` exists.
    """
    path, _ = locate(checkpoint, project, "checkpoint")
    if "checkpoint" not in kinds_of(path):
        found = "a PEFT adapter already" if kinds_of(path) else "no checkpoint (no config.json)"
        raise WorkbenchError(f"{checkpoint} is {found}", f"`workbench brick show {shell(checkpoint)}` tells what it holds.")
    brick = Brick(path.name, "checkpoint", path)
    ours, _ = resolve_base(base, project)
    tuned_from = Model(ours, ours.config)
    tuned = fitted(brick, tuned_from)
    notes = check_integers(brick, ours, tuned)
    adapted = AdaptedWeights(Model(tuned, ours.config), tuned_from, policy)
    with new_directory(out) as partial, exact(device):
        record = write_result(
            adapted, partial, base, device=device, threads=threads or default_threads(),
            progress=lambda done, total: events({"stage": "extract", "done": done, "total": total, "text": f"{total} tensors"}))  # fmt: skip
        cache = project / CACHE
        digest = weights_digest(ours.specs, tensor_digests(ours.entries, cache), ours.config)
        record = {"checkpoint": checkpoint, "base": base, **record, **({"notes": notes} if notes else {})}
        write_json(partial / RECORD, record, indent=1)
        card = BrickCard(
            version=1, name=brick_name(out), kind="adapter", base=BaseRecord(id=base, title=read_title(ours.path), digest=digest),
            digest=_digest(partial), licence=read_licence(path),
            extraction={"checkpoint": checkpoint, "digest": brick.digest(cache), "rank": record["rank"],
                        "error": float(f"{record['error']:.3g}"),
                        "rounding": float(f"{record['rounding']:.3g}"), "tensors": len(record["tensors"]),
                        "whole": record["whole"], "dropped": record["dropped"]})  # fmt: skip
        write_card(partial, card, made_by="workbench brick extract", record=RECORD)
    return record


def _digest(path: Path) -> str | None:
    """The adapter's digest as `brick verify` computes it; None where bricks of its flavour cannot be read back."""
    try:
        return Brick(path.name, "adapter", path).digest(None)
    except WorkbenchError:
        return None


def bake(
    adapter: str,
    base: str | None,
    out: Path,
    *,
    project: Path,
    device: torch.device,
    dtype: str | None = None,
    threads: int | None = None,
    events: Events = no_events,
) -> dict[str, Any]:
    """An adapter added to its base as a checkpoint: `merge: task_arithmetic` with one brick. Resumes when interrupted.

    Args:
        adapter: Directory, library name or hub id.
        base: Omitted: the base that the adapter's card or configuration names.
        out: A new directory; there whole or not at all.
        project: Where relative paths start.
        device: Where tensors are computed.
        dtype: Of the checkpoint; None keeps the base's.
        threads: Tensors at a time.
        events: Told what happens.

    Returns:
        As `run.execute.execute`. Errors: a checkpoint, no base named, `out` exists.
    """
    path, _ = locate(adapter, project, "adapter")
    files = path / read_card(path).files if (path / CARD).is_file() else path
    if "adapter" not in kinds_of(files):
        found = "a checkpoint already" if kinds_of(files) else f"no adapter (no {ADAPTER_CONFIG})"
        raise WorkbenchError(f"{adapter} is {found}", f"`workbench brick show {shell(adapter)}` tells what it holds.")
    base = base or base_of(path, project, f"--base DIR names the model that {adapter} was trained on.")
    check_new(out)
    kind = "brick" if (path / CARD).is_file() else "adapter"
    data = {
        "version": 1, "name": brick_name(out), "base": base, "bricks": {"adapter": {kind: adapter}},
        "steps": [{"merge": "task_arithmetic"}], "output": {"dtype": dtype} if dtype else {},
    }  # fmt: skip
    runs = out.with_name(f".{out.name}.baking")
    document = execute(resolve(from_data(data, project)), runs, device=device, threads=threads, events=events)
    if out.is_dir():
        out.rmdir()
    Path(document["model"]).rename(out)
    shutil.rmtree(runs)
    return {**document, "run": None, "model": str(out)}


def base_of(path: Path, project: Path, hint: str) -> str:
    """The base that a brick names: on its card, or in adapter_config.json. Errors: none named, or it is not there."""
    card = read_card(path) if (path / CARD).is_file() else None
    files = path / card.files if card else path
    named = card.base.id if card else jsondoc.optional(files / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise WorkbenchError(f"{path}: neither {CARD} nor {ADAPTER_CONFIG} names its base", hint)
    try:
        locate(named, project, "base")
    except WorkbenchError as error:
        raise WorkbenchError(f"{path}: its base is {named}, which is not there ({error.message})", hint) from None
    return str(named)


def brick_name(path: Path) -> str:
    """A directory's name as bricks may be called."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).strip("-._") or "brick"


def check_new(out: Path) -> None:
    """Errors: `out` exists and is not an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WorkbenchError(f"-o {out}: exists and is not an empty directory", "Name a new directory: nothing is overwritten.")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A place to write into that becomes `out` when the block ends well, and goes away when it does not."""
    check_new(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

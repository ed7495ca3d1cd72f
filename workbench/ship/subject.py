"""What a server is to serve: the adapters of a recipe, run or routed configuration, or a whole model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench.adapters.read import Adapter
from workbench.bricks.hub import FETCH, Hub
from workbench.ground.errors import UsageError, WorkbenchError, nearest, shell
from workbench.ground.manifest import require_whole
from workbench.ground.project import find_project
from workbench.models.texts import read_prompts
from workbench.recipe.recipe import Recipe, from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.directory import RECORD as RUN
from workbench.run.directory import RunDirectory
from workbench.run.opened import open_configuration
from workbench.run.routers import SavedRouter
from workbench.ship.servers import EXAMPLES


@dataclass(frozen=True)
class Subject:
    """What a server is to serve.

    Attributes:
        name: Name of the recipe or run.
        model: The base, or the whole model, as a recipe without bricks.
        adapters: Adapter -> its files; empty for a whole model.
        place: Directory of a whole model; None if adapters act on a base.
        base: The base as the recipe names it.
        prompts: Calibration prompts of a router, if their files are still there.
        router: Directory with the files of a router; None if there is none.
        described: Adapter -> its description in the route step, for adapters that have one.
        examples: Adapter -> some of its calibration prompts, if their files are still there.
    """

    name: str
    model: Resolved
    adapters: Mapping[str, Adapter]
    place: Path | None
    base: str
    prompts: tuple[str, ...] = ()
    router: Path | None = None
    described: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)


def of_recipe(recipe: Recipe, names: Sequence[str], hub: Hub = FETCH) -> Subject:
    """Return the adapters among a recipe's bricks, or the named ones.

    Raises:
        WorkbenchError: If a name is no brick of the recipe, a brick is no adapter, or there is none.
    """
    known = list(recipe.fields.bricks)
    for name in names:
        if name not in known:
            raise UsageError(f"--brick {name}: {recipe.name} has no such brick. {nearest(name, known)}")
    base = recipe.fields.base
    if not isinstance(base, str):
        raise WorkbenchError(
            f"{recipe.name}: its base is {recipe.fields.base_name}, but a server loads a base from files",
            "Run a recipe with this base and no steps, and use the result's directory as the base.",
        )
    resolved = resolve(recipe, hub)
    chosen = names or list(resolved.parents) or known
    other = [name for name in chosen if name not in resolved.adapters]
    if other or not chosen:
        what = f"brick '{other[0]}' is no adapter" if other else "it has no bricks"
        raise WorkbenchError(
            f"{recipe.name}: {what}, but a LoRA server serves adapters of one base",
            f"Choose bricks with --brick NAME; `workbench brick extract DIR --base {shell(base)} -o DIR` makes an adapter "
            "of a checkpoint. `workbench run` writes the result of a recipe, and `workbench export RUN` exports it.",
        )
    adapters = {name: resolved.adapters[name] for name in chosen}
    return Subject(recipe.name, _bare(base, recipe.project, hub), adapters, None, base)


def of_configuration(path: Path, hub: Hub = FETCH) -> Subject:
    """Return the bricks of a routed configuration directory.

    Raises:
        WorkbenchError: If it has a memory instead of a router, its bricks act by tokens, or its files do not belong together.
    """
    require_whole(path.resolve(), digests=True)
    whole = open_configuration(path.resolve(), None, hub)
    if whole.router is None:
        raise WorkbenchError(
            f"{path}: has a memory, which acts beside the weights in Python; servers have no place for it",
            "Score it with `workbench eval`, or use an edit method that changes weights, such as `edit: memit`.",
        )
    saved = SavedRouter(whole.router.path)
    if hasattr(saved.router, "token_weights"):
        raise WorkbenchError(
            f"{path}: its bricks act on the tokens of their roles, but a server applies one adapter to all tokens of a request",
            "Use it with `workbench.load(DIR)`, `workbench chat` and `workbench eval`, or export a merge of the bricks.",
        )
    adapters = {name: Adapter(place, f"brick '{name}'") for name, place in whole.router.adapters.items()}
    examples: dict[str, list[str]] = {}
    for row in saved.record.calibration:
        for name in row.files or [row.file]:
            file = find_project(path.resolve() / RUN) / name
            if file.is_file():
                examples.setdefault(row.name, []).extend(read_prompts(file, name, EXAMPLES))
    model = replace(whole, router=None)
    return Subject(
        whole.recipe.name,
        model,
        adapters,
        None,
        model.recipe.fields.base_name,
        tuple(prompts[0] for prompts in examples.values()),
        whole.router.path,
        {row.name: row.description for row in saved.record.bricks if row.description is not None},
        examples,
    )


def of_run(run: RunDirectory, hub: Hub = FETCH) -> Subject:
    """Return the result of a finished run: a routed configuration, an adapter on its base, or a whole model.

    Raises:
        WorkbenchError: If the run is not finished, a file is not as the run wrote it, or its base cannot be found.
    """
    run.require_whole(hub.events)
    if run.configuration.is_dir():
        return of_configuration(run.configuration, hub)
    record, project = run.read_record(), find_project(run.path / RUN)
    # Requests and folders name the result, so the brackets of a point's name cannot stay.
    name = re.sub(r"[^\w.-]+", "-", record.name or run.name).strip("-")
    if not run.adapter.is_dir():
        return replace(of_model(run.model, project, hub), name=name)
    require_whole(run.adapter, digests=True)
    base = record.inputs.base
    adapters = {name: Adapter(run.adapter, f"adapter '{name}'")}
    return Subject(name, _bare(base.reference, project, hub), adapters, None, base.id)


def of_model(path: Path, project: Path, hub: Hub = FETCH) -> Subject:
    """Return a model directory as a whole model."""
    place = path.resolve()
    require_whole(place, digests=True)
    return Subject(place.name, _bare(str(place), project, hub), {}, place, str(path))


def _bare(base: str, project: Path, hub: Hub) -> Resolved:
    return resolve(from_data({"version": 1, "name": "served", "base": base, "steps": []}, project), hub)

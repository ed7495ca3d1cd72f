"""Models without a recipe: a directory or hub id as a recipe without steps, so that it can be scored like a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.hub import FETCH, Hub
from workbench.bricks.locate import kinds_of, locate
from workbench.errors import UsageError, WorkbenchError, shell
from workbench.models.skeleton import check_decoder
from workbench.project import find_project
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.directory import RECORD, RunDirectory
from workbench.run.saved import is_configuration, open_configuration
from workbench.weights.checkpoint import INDEX, SINGLE, refuse_foreign

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class NamedModel:
    """A model that a command works on: the configuration of a recipe, or a model as a recipe without steps.

    Attributes:
        name: Its name in tables and messages.
        resolved: The recipe.
        base: Name of the base on the cards of bricks that are made for it; None is the recipe's.
    """

    name: str
    resolved: Resolved
    base: str | None = None


def is_hub_id(reference: str) -> bool:
    """Return True if a text has the form of a hub id, org/name with an optional @revision, and starts with no folder of a project."""
    folders = ("bricks", "recipes", "runs", "evals", ".", "..", "~")
    return bool(_HUB_ID.fullmatch(reference)) and reference.split("/")[0] not in folders


def _check_run(path: Path, hub: Hub) -> None:
    """Check the files of the finished run that a model belongs to, if it belongs to one."""
    run = RunDirectory(path)
    if run.done:
        run.require_whole(hub.events)


def resolve_model(reference: str, project: Path, hub: Hub = FETCH, version: int | None = None) -> NamedModel:
    """Resolve a model as a recipe without steps.

    Args:
        reference: A model directory, a run directory with a model or configuration, a configuration directory, or a hub id with
            an optional @revision.
        project: Project whose cache stores digests.
        hub: Access to the hub.
        version: Version of a configuration's memory; the newest if omitted.

    Returns:
        The recipe, named after the model's folder or repository.

    Raises:
        WorkbenchError: If it is an adapter, has no checkpoint, has pickled or quantized weights, or the hub cannot be reached.
    """
    label, place = f"model {reference}", Path(reference).expanduser()
    if found := next((p for p in (place, place / "configuration") if is_configuration(p)), None):
        whole = found.resolve()
        _check_run(whole.parent, hub)
        named = whole.parent if (whole.parent / RECORD).is_file() else whole
        return NamedModel(named.name, open_configuration(whole, version, hub))
    if version is not None:
        if not place.exists():
            raise UsageError(f"{label}: no such directory", "Give a configuration or run directory whose memory has versions.")
        raise UsageError(f"{label}: has no memory, so it has no version {version}", "Remove the version.")
    if (place / RECORD).is_file():
        _check_run(place, hub)
        if (run := RunDirectory(place.resolve())).adapter.is_dir() and run.done:
            return NamedModel(run.name, _with_adapter(run, hub))
        if not (place / "model").is_dir():
            raise WorkbenchError(
                f"{label}: this run has no finished model", f"Resume it: workbench run {shell(place / 'recipe.yaml')}"
            )
        name, target = place.resolve().name, str((place / "model").resolve())
    elif place.is_dir():
        target = str(place.resolve())
        _check_run(place.resolve().parent, hub)
        name = Path(target).parent.name if (Path(target).parent / RECORD).is_file() else Path(target).name
    elif place.is_file():
        name, target = place.stem, str(place.resolve())
    else:
        name, target = reference.partition("@")[0].rpartition("/")[2], reference
    path, _ = locate(target, project, label, replace(hub, headers_only=True))
    kinds = kinds_of(path)
    if kinds == ["adapter"]:
        raise WorkbenchError(
            f"{label}: expected a complete model, found a PEFT adapter ({ADAPTER_CONFIG})",
            f"Use it as a brick: workbench recipe new {shell(f'recipes/{name.lower()}.yaml')} --base BASE "
            f"--brick {shell(f'{name.lower()}={reference}')}",
        )
    if not kinds:
        refuse_foreign(path, label)
        raise WorkbenchError(
            f"{label}: has no checkpoint (config.json with {SINGLE} or {INDEX})",
            "Give a Hugging Face model directory, a hub id such as org/name, or a recipe.",
        )
    recipe = from_data({"version": 1, "name": "model", "base": target, "steps": []}, project)
    try:
        resolved = resolve(recipe, hub)
        if not hub.headers_only:  # it will be scored: find a model that cannot be scored before others are scored
            check_decoder(resolved.base.config)
        return NamedModel(name, resolved)
    except WorkbenchError as error:
        message = re.sub(
            r"^base(?=[: ])|^(?=config\.json:)", lambda m: label if m.group() else f"{label}: ", error.message, flags=re.MULTILINE
        )
        raise error.reworded(message, error.hint) from None


def _with_adapter(run: RunDirectory, hub: Hub) -> Resolved:
    """Resolve the adapter of a run, on its base, as a recipe without steps."""
    base = run.record["inputs"]["base"]
    on = base["id"] if not base.get("revision") or "@" in base["id"] else f"{base['id']}@{base['revision']}"
    data = {"version": 1, "name": "model", "base": {"adapter": str(run.adapter), "on": on}, "steps": []}
    return resolve(from_data(data, find_project(run.path / RECORD)), hub)

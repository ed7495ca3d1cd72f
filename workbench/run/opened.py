"""Models without a recipe: a directory or hub id becomes a recipe without steps, so that it can be scored like a recipe.

A configuration directory, which `run` writes for a recipe that ends in a memory or a router:

    configuration.json   name, base (id, revision, path, digest) and digest
    model/               the checkpoint of the steps before the memory or router; absent if it equals the base
    memory/              see `memories`
    routing.json, router.safetensors, adapters/    see `routers`
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.hub import FETCH, Hub
from workbench.bricks.locate import kinds_of, locate
from workbench.ground.errors import UsageError, WorkbenchError, shell
from workbench.ground.files import read_json, write_json
from workbench.ground.foreign_names import INDEX, SINGLE
from workbench.ground.manifest import require_whole
from workbench.ground.project import find_project, suggestion
from workbench.ground.recognize import look
from workbench.ground.results import JsonObject, Result
from workbench.models.skeleton import check_decoder
from workbench.recipe.recipe import from_data
from workbench.resolve.output import MemoryAt
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.directory import RECORD, RunDirectory
from workbench.run.record import RunBase
from workbench.weights.checkpoint import refuse_foreign

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
        return NamedModel(named.name, open_configuration(whole, version, hub, project))
    if version is not None:
        if not place.exists():
            raise UsageError(f"{label}: no such directory", "Give a configuration or run directory whose memory has versions.")
        raise UsageError(f"{label}: has no memory, so it has no version {version}", "Remove the version.")
    if (place / RECORD).is_file():
        _check_run(place, hub)
        if (run := RunDirectory(place.resolve())).adapter.is_dir() and run.done:
            return NamedModel(run.name, _with_adapter(run, project, hub))
        if not (place / "model").is_dir():
            raise WorkbenchError(
                f"{label}: this run has no finished model", f"Resume it: {shell('workbench', 'run', place / 'recipe.yaml')}"
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
        refuse_foreign(path, label)
        new = f"workbench recipe new {shell(f'use-{name.lower()}')} --base BASE --brick {shell(f'{name.lower()}={reference}')}"
        hint = thing.hint if (thing := look(place)) and thing.kind == "adapter" else new
        raise WorkbenchError(f"{label}: expected a complete model, found a PEFT adapter ({ADAPTER_CONFIG})", hint)
    if not kinds:
        refuse_foreign(path, label)
        raise WorkbenchError(
            f"{label}: has no checkpoint (config.json with {SINGLE} or {INDEX})",
            suggestion(path) or "Give a Hugging Face model directory, a hub id such as org/name, or a recipe.",
        )
    try:
        resolved = _bare(target, project, hub)
        if not hub.headers_only:  # it will be scored: find a model that cannot be scored before others are scored
            check_decoder(resolved.base.config)
        return NamedModel(name, resolved)
    except WorkbenchError as error:
        message = re.sub(
            r"^base(?=[: ])|^(?=config\.json:)", lambda m: label if m.group() else f"{label}: ", error.message, flags=re.MULTILINE
        )
        raise error.reworded(message, error.hint) from None


def _with_adapter(run: RunDirectory, project: Path, hub: Hub) -> Resolved:
    """Resolve the adapter of a run, on its base, as a recipe without steps."""
    named = run.read_record().inputs.base.reference
    own = find_project(run.path / RECORD) / named
    return _bare({"adapter": str(run.adapter), "on": str(own) if own.exists() else named}, project, hub)


CONFIGURATION, MODEL, MEMORY = "configuration.json", "model", "memory"


class ConfigurationBase(JsonObject):
    """The base of a configuration."""

    id: str
    """The base as the recipe names it."""
    revision: str | None
    """Commit of a base from the hub."""
    path: str
    """Its directory when the configuration was written."""
    digest: str
    """Digest of its weights and config.json."""
    tokenizer: str | None = None
    """Digest of its tokenizer; records of 0.2 have none."""


class ConfigurationRecord(Result):
    """Content of configuration.json."""

    version: int = 1
    """Version of the format."""
    name: str
    """Name of the recipe."""
    base: ConfigurationBase
    """The base."""
    digest: str = ""
    """Digest of the configuration."""


def refers_to_base(resolved: Resolved) -> bool:
    """Return True if a recipe's memory or router acts on the unchanged base, so that no weights are written."""
    alone = bool(resolved.recipe.memory or resolved.recipe.router) and len(resolved.recipe.steps) == 1
    own = resolved.dtype_name is None and resolved.vocabulary is None and resolved.recipe.fields.output.config is None
    return alone and own and not resolved.unties


def write_record(out: Path, resolved: Resolved, digest: str) -> None:
    """Write configuration.json of a recipe into a configuration directory; the digest is that of the configuration."""
    base = ConfigurationBase(
        id=resolved.recipe.fields.base_name,
        revision=resolved.base_revision,
        path=str(resolved.base_path.resolve()),
        digest=resolved.base_digest,
        tokenizer=resolved.tokens_at(0),
    )
    record = ConfigurationRecord(name=resolved.recipe.name, base=base, digest=digest)
    write_json(out / CONFIGURATION, record.to_dict(), indent=2)


def is_configuration(path: Path) -> bool:
    """Return True if a directory is a configuration."""
    return (path / CONFIGURATION).is_file()


def open_configuration(path: Path, version: int | None = None, hub: Hub = FETCH, project: Path | None = None) -> Resolved:
    """Resolve a configuration directory as a recipe without steps, with the saved memory or router.

    Args:
        path: The directory.
        version: Version of the memory; the newest if omitted.
        hub: Access to the hub, for a base that is no longer at its recorded path.
        project: Project whose cache and tasks are used; default: the one that the directory lies in.

    Raises:
        WorkbenchError: If it is not a configuration, its files are not as they were written, its base is missing or has changed, or its router's files do not belong together.
    """
    from workbench.run.memories import SavedMemory
    from workbench.run.routers import RECORD as ROUTER
    from workbench.run.routers import SavedRouter

    require_whole(path)
    content = read_json(path / CONFIGURATION)
    if content is None:
        raise WorkbenchError(
            f"{path} is not a configuration: it has no {CONFIGURATION}",
            "`workbench run` writes one if the recipe ends in a memory or route step.",
        )
    record = ConfigurationRecord.of(content, str(path / CONFIGURATION))
    if (path / ROUTER).is_file() and not (path / MEMORY).is_dir():
        if version is not None:
            raise UsageError(f"{path}: a router has no versions, so it has no version {version}", "Remove the version.")
        resolved = replace(_model(path, record, hub, "router", project), router=SavedRouter(path).at())
    else:
        saved = SavedMemory(path / MEMORY)
        number = saved.log.version if version is None else version
        memory = MemoryAt(saved.path, number, saved.digest(number))
        resolved = replace(_model(path, record, hub, "memory", project), memory=memory)
    return replace(
        resolved, recipe=replace(resolved.recipe, fields=resolved.recipe.fields.model_copy(update={"name": record.name}))
    )


def _model(path: Path, record: ConfigurationRecord, hub: Hub, part: str, project: Path | None) -> Resolved:
    """Resolve the checkpoint in the configuration, or the base that its record names: its path, or else its name in its own project."""
    own, base = find_project(path.resolve() / CONFIGURATION), record.base
    if (path / MODEL).is_dir():
        return _bare(str((path / MODEL).resolve()), project or own, hub)
    named = RunBase(id=base.id, revision=base.revision).reference
    places = [place for place in (Path(base.path), own / base.id) if (place / "config.json").is_file()]
    resolved = _bare(str(places[0]) if places else named, project or own, hub)
    if resolved.base_digest != base.digest:
        raise WorkbenchError(
            f"{path}: the weights or config.json of its base {base.id} have changed (digest {resolved.base_digest[:10]}, the {part} was made on "
            f"{base.digest[:10]})",
            "Restore the old weights, or run the recipe again.",
        )
    if "tokenizer" in base.model_fields_set and base.tokenizer != resolved.tokens_at(0):
        raise WorkbenchError(
            f"{path}: the tokenizer of its base {base.id} has changed since the {part} was made",
            "Restore the old tokenizer, or run the recipe again.",
        )
    return resolved


def _bare(base: str | dict[str, str], project: Path, hub: Hub) -> Resolved:
    """Resolve a base as a recipe without steps."""
    return resolve(from_data({"version": 1, "name": "model", "base": base, "steps": []}, project), hub)

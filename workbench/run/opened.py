"""Models that no recipe makes: a directory or a hub id as a recipe without steps, to be scored beside recipes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.hub import FETCH, Hub
from workbench.bricks.locate import kinds_of, locate
from workbench.errors import WorkbenchError, shell
from workbench.models.skeleton import check_decoder
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.directory import RECORD
from workbench.run.saved import is_configuration, open_configuration
from workbench.weights.checkpoint import INDEX, SINGLE, refuse_foreign

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_model(reference: str) -> bool:
    """Whether a word of the command line means a model: an existing directory, or what looks like a hub id."""
    if Path(reference).suffix in (".yaml", ".yml"):
        return False
    folders = ("bricks", "recipes", "runs", "evals", ".", "..", "~")
    return Path(reference).expanduser().is_dir() or (
        bool(_HUB_ID.fullmatch(reference)) and reference.split("/")[0] not in folders
    )


def resolve_model(reference: str, project: Path, hub: Hub = FETCH, version: int | None = None) -> tuple[str, Resolved]:
    """A model and its name: the folder's, or the repository's. Its key and digest are those of a recipe without steps on it.

    Args:
        reference: A directory, a run directory with a model or a configuration in it, a configuration directory, or a hub id with an
            optional @revision.
        project: Whose cache keeps digests.
        version: Of a configuration's memory; the newest if omitted.

    Errors: an adapter, neither adapter nor checkpoint, pickles, quantised weights, a hub that cannot be reached.
    """
    label, place = f"model {reference}", Path(reference).expanduser()
    if found := next((p for p in (place, place / "configuration") if is_configuration(p)), None):
        whole = found.resolve()
        return (whole.parent if (whole.parent / RECORD).is_file() else whole).name, open_configuration(whole, version, hub)
    if version is not None:
        raise WorkbenchError(f"{label}: holds no memory, and so no version {version}", "Leave the version out.", 2)
    if (place / RECORD).is_file():
        if not (place / "model").is_dir():
            raise WorkbenchError(
                f"{label}: a run without a finished model", f"Score its recipe: workbench eval {shell(place / 'recipe.yaml')}"
            )
        name, target = place.resolve().name, str((place / "model").resolve())
    elif place.is_dir():
        target = str(place.resolve())
        name = Path(target).parent.name if (Path(target).parent / RECORD).is_file() else Path(target).name
    else:
        name, target = reference.partition("@")[0].rpartition("/")[2], reference
    path, _ = locate(target, project, label, replace(hub, headers_only=True))
    kinds = kinds_of(path)
    if kinds == ["adapter"]:
        raise WorkbenchError(
            f"{label}: a PEFT adapter ({ADAPTER_CONFIG}), not a whole model",
            f"Name it as a brick: workbench recipe new {shell(f'recipes/{name.lower()}.yaml')} --base BASE "
            f"--brick {shell(f'{name.lower()}={reference}')}",
        )
    if not kinds:
        refuse_foreign(path, label)
        raise WorkbenchError(
            f"{label}: holds no checkpoint (config.json with {SINGLE} or {INDEX})",
            "Expected a Hugging Face model directory, a hub id org/name, or a recipe.",
        )
    recipe = from_data({"version": 1, "name": "model", "base": target, "steps": []}, project)
    try:
        resolved = resolve(recipe, hub)
        if not hub.headers_only:  # it will be scored: what cannot be is found out before another model is
            check_decoder(resolved.base.config)
        return name, resolved
    except WorkbenchError as error:
        message = re.sub(
            r"^base(?=[: ])|^(?=config\.json:)", lambda m: label if m.group() else f"{label}: ", error.message, flags=re.MULTILINE
        )
        raise WorkbenchError(message, error.hint, error.exit_code) from None

"""What `eval`, `compare` and `report` do with what they open, and single configurations for other commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.api.naming import no_subject, recipe_path
from workbench.api.subjects import Listener
from workbench.cli._output import out
from workbench.errors import LeftOut, shell

if TYPE_CHECKING:
    from workbench.compare.compare import Comparison
    from workbench.compare.sweeps import Sweep
    from workbench.run.opened import NamedModel
    from workbench.scores.store import Scores, ScoreStore


def printing() -> Listener:
    """Return the listener that prints on the terminal."""
    return Listener(out.event, out.say, out.warn)


def told(left_out: list[LeftOut]) -> dict[str, Any]:
    """Return the `left_out` field of a JSON document, as a dictionary that is empty if nothing was skipped."""
    return {"left_out": [{"name": one.name, "reason": one.reason} for one in left_out]} if left_out else {}


def command_line() -> str:
    """Return the command line of this process."""
    return shell("workbench", *sys.argv[1:])


def compare_scores(
    store: ScoreStore, scores: list[Scores], baseline: str | None, project: Path, sweeps: Sequence[Sweep] = ()
) -> Comparison:
    """Compare scores, and record the command line that makes the comparison."""
    from workbench.compare.compare import compare

    return compare(store, scores, baseline=baseline, project=project, command=command_line(), sweeps=sweeps)


def open_configuration(reference: str) -> NamedModel:
    """Resolve a recipe or model.

    Args:
        reference: Recipe, model directory or hub id as named on the command line.

    Raises:
        WorkbenchError: If it is neither a recipe nor a model.
    """
    from workbench.api.naming import load_named
    from workbench.bricks.hub import Hub
    from workbench.project import find_project
    from workbench.resolve.resolve import resolve
    from workbench.run.opened import NamedModel, is_model, resolve_model

    hub, path = Hub(events=out.event), recipe_path(reference)
    if path.suffix in (".yaml", ".yml"):
        loaded = load_named(reference)
        return NamedModel(loaded.name, resolve(loaded, hub))
    if not is_model(reference):
        raise no_subject(reference)
    project = find_project(Path.cwd() / "here")
    model = resolve_model(reference, project, hub)
    base = model.resolved.recipe.fields.base_name
    if not Path(reference).is_absolute() and (project / reference).resolve() == Path(base):
        return replace(model, base=str(Path(reference)))
    return replace(model, base=str(Path(base).relative_to(project))) if Path(base).is_relative_to(project) else model

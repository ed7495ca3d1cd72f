"""Resolve the names that users type: a recipe's name or file, a point of its sweep, a run, a directory or a hub id.

Every command and function of the Python API that takes such a name calls `find`, `load_named` or `open_named`, or `Variation.recipes` for
recipes with overrides and sweeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.ground.errors import UsageError, WorkbenchError, nearest, shell
from workbench.ground.events import Events, no_events
from workbench.ground.foreign_names import GGUF, as_name, retyped
from workbench.ground.project import find_project, relative, runs_of

if TYPE_CHECKING:
    from workbench.bricks.hub import Hub
    from workbench.compare.swept import Sweep
    from workbench.recipe.recipe import Recipe
    from workbench.run.directory import RunDirectory
    from workbench.run.opened import NamedModel


SUFFIXES = (".yaml", ".yml")
_KEY = len("-1a2b3c4d5e")  # letters that a run's name has after that of its recipe
_POINTS = re.compile(r"(.+?)((?:\[[^\[\]]*\])+)", re.DOTALL)
_KNOWN = ("config.json", "adapter_config.json", "configuration.json", "brick.yaml")
"""Files of which a directory that a name can mean has one, if it is no run."""


@dataclass(frozen=True)
class Named:
    """Hold the meaning of a name.

    Attributes:
        name: The name, as the user types it.
        kind: "run" is a directory that `workbench run` wrote; "model" is any other directory, a GGUF file or a hub id.
        path: The recipe's file, the run's directory or the model; None for a hub id.
        point: The points of sweeps at the end of a recipe's name, such as "[lambda=0.5,ties]"; else empty.
    """

    name: str
    kind: Literal["recipe", "run", "model"]
    path: Path | None
    point: str = ""

    @property
    def run(self) -> RunDirectory | None:
        """The run, also if its model, adapter or configuration is named; None for other names."""
        from workbench.run.directory import RECORD, RunDirectory

        places = () if self.path is None or self.kind == "recipe" else (self.path.resolve(), self.path.resolve().parent)
        return next((RunDirectory(place) for place in places if (place / RECORD).is_file()), None)

    @property
    def typed(self) -> str:
        """A path to type that means this thing and no other."""
        place = relative(self.path) if self.path else Path(self.name)
        return f"{'' if place.is_absolute() or len(place.parts) > 1 else './'}{place}{self.point}"


def find(name: str, runs: Path | None = None) -> Named:
    """Return what a name means.

    Args:
        name: A recipe's file or NAME for recipes/NAME.yaml, each also with a point of its sweep; a run's directory, its name, or the
            start of its name if that says the recipe's; a model directory, a GGUF file or a hub id.
        runs: Directory of runs; default: runs/ in the project.

    Raises:
        WorkbenchError: If the name means nothing, or two things. The message suggests what to type.
    """
    folder = runs_folder(runs)
    found = list(_meanings(name, folder)) if name else []
    if len(found) > 1:
        listed = " and ".join(f"{_described(one)} ({shell(one.typed)})" for one in found)
        raise UsageError(f"'{name}' is {listed}", f"Type {' or '.join(shell(one.typed) for one in found)}.")
    if found:
        return found[0]
    from workbench.run.directory import find_run, list_runs

    path = Path(name).expanduser()
    every = [run.name for run in list_runs(folder)]
    # The start says at least the recipe's whole name, so that a misspelt name is not a run of another recipe.
    if any(run.startswith(name) and len(name) >= len(run) - _KEY for run in every):
        return Named(name, "run", find_run(folder, name).path)
    if name and path.is_dir():  # without any file that a model has, which is said where it is opened
        return Named(name, "model", path)
    from workbench.run.opened import is_hub_id

    if is_hub_id(name):
        return Named(name, "model", None)
    meant = retyped(name)
    raise UsageError(
        f"'{name}': expected a recipe, a model directory or a hub id (org/name), or a run in {folder}. "
        + (f"Did you mean '{meant}'?" if meant else nearest(_split(name)[0], {*(file.stem for file in recipe_files()), *every})),
        "`ls recipes` and `workbench runs ls` list the names of this project; `workbench recipe new NAME` creates a recipe.",
    )


def _split(name: str) -> tuple[str, str]:
    """Return a name without the points of sweeps at its end, and these."""
    parts = _POINTS.fullmatch(name)
    return (parts[1], parts[2]) if parts else (name, "")


def _meanings(name: str, runs: Path) -> Iterator[Named]:
    """Yield everything that a name means exactly."""
    from workbench.run.directory import RECORD

    path = Path(name).expanduser()
    if path.is_file():
        yield Named(name, "model" if path.suffix == GGUF else "recipe", path)
    elif (path / RECORD).is_file():
        yield Named(name, "run", path)
    elif path.is_dir() and any((path / file).is_file() for file in _KNOWN):
        yield Named(name, "model", path)
    elif path.suffix in SUFFIXES:  # reading it says that there is no such file
        yield Named(name, "recipe", path)
    whole, point = _split(name)
    for one in _meanings(whole, runs) if point else ():
        if one.kind == "recipe":
            yield Named(name, "recipe", one.path, point)
    if name.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        return
    for suffix in SUFFIXES:
        if (file := recipes_folder() / f"{name}{suffix}").is_file():
            yield Named(name, "recipe", file)
    if len(path.parts) == 1 and (runs / name / RECORD).is_file():
        yield Named(name, "run", runs / name)


def _described(found: Named) -> str:
    """Describe what a name means, for an error."""
    return {"recipe": "a recipe", "run": "a run", "model": "a model"}[found.kind]


def recipes_folder() -> Path:
    """Return the folder of the project's recipes, as a path from the current folder."""
    return relative(find_project() / "recipes")


def recipe_files() -> list[Path]:
    """Return the project's recipes."""
    return sorted(file for suffix in SUFFIXES for file in recipes_folder().glob(f"*{suffix}") if not file.is_dir())


def runs_folder(runs: Path | None) -> Path:
    """Return the folder of runs and scores: the one that is given, or that of the current folder's project."""
    return runs or relative(runs_of(find_project()))


def load_named(
    name: str, settings: Sequence[str] = (), say: Callable[[str], None] | None = None, runs: Path | None = None
) -> Recipe:
    """Return the recipe that a name means: that of a file or point, the one that made a run, or a model as a recipe without steps.

    Args:
        name: A name; see `find`.
        settings: Overrides as in `--set`.
        say: Receives what the overrides change beyond the fields that they name.
        runs: Directory of runs; default: runs/ in the project.

    Raises:
        WorkbenchError: If the name means nothing, the recipe is invalid, or its sweep has no such point.
    """
    from workbench.recipe.recipe import from_data, load_recipe

    found = find(name, runs)
    run = found.run if found.path is not None and not (found.path / "config.json").is_file() else None
    if found.kind == "recipe" or run:
        file = run.path / "recipe.yaml" if run else found.path
        assert file is not None
        loaded = load_recipe(file, settings)
        if say is not None:
            for note in loaded.notes:
                say(note)
        if run:
            own = (run.record.name if run.record else None) or loaded.name
            loaded = replace(loaded, fields=loaded.fields.model_copy(update={"name": own}))
        for point in re.findall(r"\[[^\]]*\]", found.point):
            from workbench.recipe.sweep import point_of

            loaded = point_of(loaded, point)
        return replace(loaded, typed=(name, *loaded.typed[1:]))
    if settings:
        raise UsageError(f"--set overrides recipe fields, but {name} is a model", "Remove --set, or name a recipe.")
    place = name if found.path is None else str(found.path.resolve())
    label = as_name(Path(name.partition("@")[0] if found.path is None else found.path.name or place).name)
    return from_data({"version": 1, "name": label or "model", "base": place, "steps": []}, find_project())


def open_named(
    name: str, events: Events = no_events, runs: Path | None = None, project: Path | None = None, *, hub: Hub | None = None
) -> NamedModel:
    """Return the model that a name means, with its inputs: a recipe's result, a run's result, or a model itself.

    Args:
        name: A name; see `find`.
        events: Receives progress of downloads.
        runs: Directory of runs; default: runs/ in the project.
        project: Project whose cache stores digests of a model; default: the one of the current folder.
        hub: Access to the hub; default: with downloads.

    Raises:
        WorkbenchError: If the name means nothing, or the model cannot be opened.
    """
    from workbench.bricks.hub import Hub
    from workbench.resolve.resolve import resolve
    from workbench.run.opened import NamedModel, resolve_model

    found, hub = find(name, runs), hub or Hub(events=events)
    if found.kind == "recipe":
        loaded = load_named(name, runs=runs)
        return NamedModel(loaded.name, resolve(loaded, hub))
    project = project or find_project()
    model = resolve_model(name if found.path is None else str(found.path), project, hub)
    model = replace(model, resolved=replace(model.resolved, recipe=replace(model.resolved.recipe, typed=(name,))))
    base = model.resolved.recipe.fields.base_name
    if found.path is not None and not found.path.is_absolute() and (project / found.path).resolve() == Path(base):
        return replace(model, base=str(found.path))
    return replace(model, base=str(Path(base).relative_to(project))) if Path(base).is_relative_to(project) else model


def run_named(name: str, runs: Path | None = None) -> RunDirectory:
    """Return the run that a name means (see `find`), finished or not; for a recipe, the run of the recipe as it is now.

    Args:
        name: A name; see `find`.
        runs: Directory of runs; default: runs/ in the project.

    Raises:
        WorkbenchError: If the name means no run, or a recipe that has not been run as it is now.
    """
    from workbench.bricks.hub import HEADERS
    from workbench.resolve.resolve import resolve
    from workbench.run.directory import RECORD, list_runs, run_of

    found = find(name, runs)
    if run := found.run:
        return run
    if found.kind == "model":
        raise UsageError(f"{name}: expected a run, found a model", "`workbench runs ls` lists all runs.")
    recipe = load_named(name, runs=runs)
    folder = runs or relative(runs_of(recipe.project))
    run = run_of(resolve(recipe, HEADERS), folder)
    if (run.path / RECORD).is_file():
        return run
    others = [one.name for one in list_runs(folder) if one.record and one.record.name == recipe.name]
    also = f"; runs of earlier versions of it: {', '.join(others[:4])}" if others else ""
    raise WorkbenchError(
        f"{name}: the recipe has not been run as it is now{also}", f"{shell('workbench', 'run', name)}, or name one of its runs."
    )


def configuration_named(name: str, runs: Path | None = None) -> Path:
    """Return the configuration directory that a name means, or the directory itself if it holds none.

    Args:
        name: A configuration directory, or a name (see `find`) of a run with one.
        runs: Directory of runs; default: runs/ in the project.
    """
    from workbench.run.opened import is_configuration

    path = Path(name)
    if not is_configuration(path) and find(name, runs).kind != "model":
        path = run_named(name, runs).path
    return path / "configuration" if is_configuration(path / "configuration") else path


@dataclass(frozen=True)
class Variation:
    """How a user changes the recipes that they name.

    Attributes:
        settings: Values of `--set`.
        sweep: Values of `--sweep`.
        most: Value of `--max-points`.
    """

    settings: Sequence[str] = ()
    sweep: Sequence[str] = ()
    most: int | None = None

    @classmethod
    def of(cls, settings: list[str] | None, sweep: list[str] | None, most: int | None) -> Variation:
        """Return the variation of a command's options."""
        return cls(tuple(settings or ()), tuple(sweep or ()), most)

    @property
    def options(self) -> list[str]:
        """The options as words of a command line."""
        words = [word for setting in self.settings for word in ("--set", setting)]
        words += [word for one in self.sweep for word in ("--sweep", one)]
        return words + (["--max-points", str(self.most)] if self.most is not None else [])

    def check_used(self, recipes: bool) -> None:
        """Raise UsageError if an option changes recipes, but only models are named."""
        if not recipes and (self.settings or self.sweep):
            option = "--set overrides" if self.settings else "--sweep varies"
            name = option.partition(" ")[0]
            raise UsageError(f"{option} recipe fields, but only models are named", f"Remove {name}, or name a recipe.")

    def recipes(self, name: str, say: Callable[[str], None], runs: Path | None = None) -> tuple[list[Recipe], Sweep | None]:
        """Return the configurations of a recipe, and its sweep if it has one.

        Args:
            name: The recipe as named on the command line, or a point of its sweep.
            say: Receives what `--set` changes beyond the fields that it names.
            runs: Directory of runs; default: runs/ in the project.

        Raises:
            WorkbenchError: If the recipe or its sweep is invalid, or the sweep has too many points.
        """
        from workbench.recipe.sweep import expand

        expanded = expand(load_named(name, self.settings, say, runs), self.sweep, self.most)
        return list(expanded.recipes), expanded.sweep

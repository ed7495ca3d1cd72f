"""Open the subjects of `eval`, `compare` and `report`: recipes, models and imported runs, with controls, suites and plans."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli._output import out
from workbench.cli._recipes import no_subject, recipe_path
from workbench.cli._variation import Variation
from workbench.errors import LeftOut, UsageError, WorkbenchError, shell

if TYPE_CHECKING:
    import torch

    from workbench.compare.compare import Comparison
    from workbench.compare.sweeps import Sweep
    from workbench.evaluate.lineup import LineupEntry
    from workbench.recipe.recipe import Recipe
    from workbench.run.opened import NamedModel
    from workbench.scores.plan import ScorePlan
    from workbench.scores.store import Scores, ScoreStore


@dataclass(frozen=True)
class Opened:
    """Configurations to score or compare, and everything that this needs.

    Attributes:
        entries: Configurations, controls first.
        plans: One plan per suite.
        store: The score store.
        project: Project whose recipes, suites and tasks are used.
        runs: Directory of runs.
        aliases: A model's argument on the command line -> its name.
        left_out: Configurations that are skipped, with reasons.
        sweeps: Sweeps whose points are among the configurations.
    """

    entries: list[LineupEntry]
    plans: list[ScorePlan]
    store: ScoreStore
    project: Path
    runs: Path
    aliases: dict[str, str]
    left_out: list[LeftOut]
    sweeps: tuple[Sweep, ...] = ()

    def baseline(self, asked: str | None) -> str | None:
        """Return the baseline's name: the given one, None if the suite decides (a base is scored), else the first model's.

        Args:
            asked: Value of `--baseline`.
        """
        if asked:
            return self.aliases.get(asked, asked)
        return None if any(entry.role == "base" for entry in self.entries) else self.entries[0].name

    def pair(self, names: list[str]) -> tuple[str, str] | None:
        """Return the names of the two configurations that a command names, in its order; None if these are not exactly two.

        Args:
            names: Recipes and models as named on the command line.
        """
        named = [entry.name for entry in self.entries if entry.role == "configuration"]
        recipes = iter([name for name in named if name not in self.aliases.values()])
        arguments = list(dict.fromkeys(names))
        if len(named) != 2 or len(arguments) != 2:
            return None
        first, second = (self.aliases[name] if name in self.aliases else next(recipes) for name in arguments)
        return first, second


def open_subjects(
    names: list[str],
    vary: Variation,
    suite: list[str] | None,
    runs_dir: Path | None,
    controls: bool,
    batch_size: int,
    limit: int | None,
    lenient: bool = False,
    fetch: bool = False,
    device: torch.device | None = None,
    skip: bool = False,
) -> Opened:
    """Open recipes and models, their controls, the plans of their suites and the score store.

    Args:
        names: Recipes and models as named on the command line.
        vary: Values of `--set` and `--sweep`.
        suite: Values of `--suite`; default: the recipes' `eval`.
        runs_dir: Directory of runs; default: runs/ in the project.
        controls: Add the base, each brick alone and their average.
        batch_size: Requests per forward pass; part of the plan.
        limit: Items per task; part of the plan.
        lenient: Skip recipes whose inputs are missing, or whose base or dtype differs from the first recipe's.
        fetch: Download inputs from the hub; not needed to look up stored scores.
        device: Device on which the base may answer prompts; not needed to look up stored scores.
        skip: Skip invalid recipes and, unless `lenient` is set, recipes whose inputs are missing.

    Raises:
        WorkbenchError: If an argument is neither a recipe nor a model, or if no recipe remains.
    """
    from workbench.bricks.hub import Hub
    from workbench.evaluate.lineup import lineup
    from workbench.evaluate.plans import plans
    from workbench.evaluate.suitechoice import suites_of
    from workbench.project import find_project
    from workbench.run.opened import is_model, resolve_model
    from workbench.scores.store import ScoreStore

    references = [name for name in dict.fromkeys(names) if recipe_named(name) is None and is_model(name)]
    left_out: list[LeftOut] = []
    wanted = [name for name in names if name not in references]
    loaded, sweeps = _loaded(wanted, vary, left_out if skip else None)
    if skip and not lenient:
        loaded = _with_inputs(loaded, left_out)
    if left_out and not loaded and not references:
        raise _none_left(left_out)
    if lenient:
        loaded = _comparable(loaded)
    vary.check_used(bool(loaded))
    project = loaded[0].project if loaded else find_project(Path.cwd() / "here")
    hub = Hub(headers_only=not fetch, events=out.event)
    models = {reference: resolve_model(reference, project, hub) for reference in references}
    entries = lineup(loaded, controls, hub, models.values(), sequences=not suite, left_out=left_out)
    for one in left_out:
        out.warn(f"left out: {one.name} ({one.reason})")
    chosen = suites_of(loaded, suite or [], project)
    runs = runs_dir or project / "runs"
    aliases = {reference: model.name for reference, model in models.items()}
    score_plans = plans(entries, chosen, batch_size=batch_size, limit=limit, device=device, events=out.event, lenient=lenient)
    return Opened(entries, score_plans, ScoreStore(runs / "scores"), project, runs, aliases, left_out, tuple(sweeps))


def recipe_named(name: str) -> Path | None:
    """Return the recipe file that an argument names, or None if it names no recipe."""
    path = recipe_path(name)
    return path if path.is_file() and path.suffix in (".yaml", ".yml") else None


def _recipe(name: str) -> Path:
    """Return the recipe file that an argument names.

    Raises:
        WorkbenchError: If the argument is neither a recipe nor a model.
    """
    path = recipe_path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    error = no_subject(name)
    error.hint = "Imported runs need their suite too: --suite NAME. `workbench scores ls` lists stored scores."
    raise error


def _loaded(names: list[str], vary: Variation, left_out: list[LeftOut] | None) -> tuple[list[Recipe], list[Sweep]]:
    """Load recipes and expand their sweeps.

    Args:
        names: The recipes as named on the command line.
        vary: Values of `--set` and `--sweep`.
        left_out: List that receives invalid recipes; None: they are errors.
    """
    recipes: list[Recipe] = []
    sweeps = []
    for name in names:
        path = _recipe(name)
        try:
            expanded, sweep = vary.recipes(name)
        except WorkbenchError as error:
            if left_out is None or not path.is_file():
                raise
            left_out.append(LeftOut(path.stem, error.message.splitlines()[0], f"workbench recipe check {shell(path)}", error))
            continue
        recipes += expanded
        sweeps += [sweep] if sweep else []
    return recipes, sweeps


def _with_inputs(recipes: list[Recipe], left_out: list[LeftOut]) -> list[Recipe]:
    """Return the recipes whose inputs exist, and add the others to `left_out`."""
    from workbench.bricks.hub import HEADERS
    from workbench.resolve.resolve import resolve

    complete = []
    for recipe in recipes:
        try:
            resolve(recipe, HEADERS)
            complete.append(recipe)
        except WorkbenchError as error:
            left_out.append(LeftOut(recipe.name, error.message.splitlines()[0], error.hint, error))
    return complete


def _none_left(left_out: list[LeftOut]) -> WorkbenchError:
    """Return the error of a command whose recipes are all skipped: the error of the first one."""
    first = left_out[0].error or WorkbenchError(f"{left_out[0].name}: {left_out[0].reason}", left_out[0].hint)
    more = f"\nevery recipe is left out: {', '.join(one.name for one in left_out)}" if len(left_out) > 1 else ""
    return first.reworded(first.message + more, first.hint)


def refuse_left_out(left_out: list[LeftOut]) -> None:
    """End a command with exit code 1, after its output, if configurations were skipped.

    Raises:
        WorkbenchError: If `left_out` is not empty.
    """
    if left_out:
        names = ", ".join(dict.fromkeys(one.name for one in left_out))
        hints = dict.fromkeys(one.hint for one in left_out if one.hint)
        raise WorkbenchError(f"left out: {names}", "; ".join(hints) or None)


def told(left_out: list[LeftOut]) -> dict[str, Any]:
    """Return the `left_out` field of a JSON document, as a dictionary that is empty if nothing was skipped."""
    return {"left_out": [{"name": one.name, "reason": one.reason} for one in left_out]} if left_out else {}


def _comparable(recipes: list[Recipe]) -> list[Recipe]:
    """Return the recipes whose inputs exist and whose base and dtype equal the first one's; print which are left out, and why."""
    from workbench.bricks.hub import HEADERS
    from workbench.evaluate.plans import scored_dtype
    from workbench.resolve.resolve import resolve

    kept: dict[tuple[str, str], list[Recipe]] = {}
    for recipe in recipes:
        try:
            resolved = resolve(recipe, HEADERS)
            kept.setdefault((resolved.base_digest, scored_dtype(resolved)), []).append(recipe)
        except WorkbenchError as error:
            out.say(f"left out: {recipe.name} ({error.message.splitlines()[0]})")
    first, *others = kept.values() or [[]]
    for recipe in (recipe for group in others for recipe in group):
        out.say(f"left out: {recipe.name} (another base or output dtype than {first[0].name})")
    if not first:
        raise WorkbenchError("no recipe has all its inputs", "`workbench plan RECIPE` says what is missing.")
    return first


def imported_scores(
    names: list[str], suite: list[str] | None, runs_dir: Path | None
) -> tuple[list[Scores], ScoreStore, Path] | None:
    """Return scores that `scores import` stored under the suite of `--suite`, the score store and the project.

    Args:
        names: Names of imported configurations, the first one first; empty: all that were imported with the newest one.
        suite: Values of `--suite`.
        runs_dir: Directory of runs; default: runs/ in the project.

    Returns:
        None if no suite of `suite` holds imported scores.

    Raises:
        WorkbenchError: If `suite` names several suites.
    """
    from workbench.project import find_project
    from workbench.scores.imported import find_imported, imported_suites
    from workbench.scores.store import ScoreStore

    project = find_project(Path.cwd() / "here")
    store = ScoreStore((runs_dir or project / "runs") / "scores")
    known = imported_suites(store)
    if not suite or not any(name in known for name in suite):
        return None
    if len(suite) > 1:
        raise UsageError(
            f"--suite {' --suite '.join(suite)}: imported runs can be compared on one suite at a time", "Name one suite."
        )
    return find_imported(store, suite[0], names), store, project


def eval_command(names: list[str], suite: list[str] | None, vary: Variation, limit: int | None, batch_size: int) -> str:
    """Return the `workbench eval` command that makes the scores which this command looks for."""
    options = [part for s in suite or () for part in ("--suite", s)] + vary.options
    options += ["--limit", str(limit)] if limit else []
    options += ["--batch-size", str(batch_size)] if batch_size != 32 else []
    return shell("workbench", "eval", *(dict.fromkeys(names) or ["RECIPE"]), *options)


def compare_scores(
    store: ScoreStore, scores: list[Scores], baseline: str | None, project: Path, sweeps: Sequence[Sweep] = ()
) -> Comparison:
    """Compare scores, and record the command line that makes the comparison."""
    from workbench.compare.compare import compare

    command = shell("workbench", *sys.argv[1:])
    return compare(store, scores, baseline=baseline, project=project, command=command, sweeps=sweeps)


def open_configuration(reference: str) -> NamedModel:
    """Resolve a recipe or model.

    Args:
        reference: Recipe, model directory or hub id as named on the command line.

    Raises:
        WorkbenchError: If it is neither a recipe nor a model.
    """
    from workbench.bricks.hub import Hub
    from workbench.cli._recipes import load_named
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

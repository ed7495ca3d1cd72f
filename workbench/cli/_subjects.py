"""What `eval`, `compare` and `report` name: recipes, models, imported runs; their controls, suites and plans."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli._output import out
from workbench.cli._recipes import no_subject, recipe_path
from workbench.errors import LeftOut, WorkbenchError, shell

if TYPE_CHECKING:
    import torch

    from workbench.compare.compare import Comparison
    from workbench.evaluate.lineup import LineupEntry
    from workbench.recipe.recipe import Recipe
    from workbench.scores.plan import ScorePlan
    from workbench.scores.store import Scores, ScoreStore


@dataclass(frozen=True)
class Opened:
    """What a call is about.

    Attributes:
        entries: Configurations, controls first.
        plans: One a suite.
        store: Where scores are kept.
        project: Whose recipes, suites and tasks count.
        runs: Where runs are kept.
        aliases: What a model was called on the command line -> its name.
        left_out: What is skipped, with the reason.
    """

    entries: list[LineupEntry]
    plans: list[ScorePlan]
    store: ScoreStore
    project: Path
    runs: Path
    aliases: dict[str, str]
    left_out: list[LeftOut]

    def baseline(self, asked: str | None) -> str | None:
        """What differences are taken against: what was asked for, else the recipes' base (None: the suite says it), else the first model."""
        if asked:
            return self.aliases.get(asked, asked)
        return None if any(entry.role == "base" for entry in self.entries) else self.entries[0].name


def open_subjects(
    names: list[str],
    settings: list[str] | None,
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
        lenient: Leave out recipes whose inputs are missing, or that have another base or dtype than the first one.
        fetch: Download inputs from the hub. Stored scores are looked up without.
        device: Where the base may answer prompts. Stored scores are looked up without.
        skip: Leave out recipes that are invalid, and, where `lenient` is not set, those whose inputs are missing.
    """
    from workbench.bricks.hub import Hub
    from workbench.evaluate.lineup import lineup
    from workbench.evaluate.plans import plans
    from workbench.evaluate.suitechoice import suites_of
    from workbench.project import find_project
    from workbench.recipe.recipe import load_recipe
    from workbench.run.opened import is_model, resolve_model
    from workbench.scores.store import ScoreStore

    references = [name for name in dict.fromkeys(names) if recipe_named(name) is None and is_model(name)]
    left_out: list[LeftOut] = []
    wanted = [name for name in names if name not in references]
    loaded = _valid(wanted, settings, left_out) if skip else [load_recipe(_recipe(name), settings or ()) for name in wanted]
    if skip and not lenient:
        loaded = _there(loaded, left_out)
    if left_out and not loaded and not references:
        raise _none_left(left_out)
    if lenient:
        loaded = _comparable(loaded)
    if settings and not loaded:
        raise WorkbenchError("--set changes recipes, and only models are named", "Leave --set out.", 2)
    project = loaded[0].project if loaded else find_project(Path.cwd() / "here")
    hub = Hub(headers_only=not fetch, events=out.event)
    models = {reference: resolve_model(reference, project, hub) for reference in references}
    entries = lineup(loaded, controls, hub, models.values(), sequences=not suite, left_out=left_out)
    for one in left_out:
        out.warn(f"left out: {one.name} ({one.reason})")
    chosen = suites_of(loaded, suite or [], project)
    runs = runs_dir or project / "runs"
    aliases = {reference: name for reference, (name, _) in models.items()}
    found = plans(entries, chosen, batch_size=batch_size, limit=limit, device=device, events=out.event, lenient=lenient)
    return Opened(entries, found, ScoreStore(runs / "scores"), project, runs, aliases, left_out)


def recipe_named(name: str) -> Path | None:
    """The recipe's file that a word of the command line means; None where it means none."""
    path = recipe_path(name)
    return path if path.is_file() and path.suffix in (".yaml", ".yml") else None


def _recipe(name: str) -> Path:
    """The recipe's file. Errors: a word that is neither a recipe nor a model."""
    path = recipe_path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    error = no_subject(name)
    error.hint = "Imported runs are named together with their suite: --suite NAME. `workbench scores ls` lists what is scored."
    raise error


def _valid(names: list[str], settings: list[str] | None, left_out: list[LeftOut]) -> list[Recipe]:
    """Load recipes; those that are invalid go to `left_out`."""
    from workbench.recipe.recipe import load_recipe

    found = []
    for name in names:
        path = _recipe(name)
        try:
            found.append(load_recipe(path, settings or ()))
        except WorkbenchError as error:
            if not path.is_file():
                raise
            left_out.append(LeftOut(path.stem, error.message.splitlines()[0], f"workbench recipe check {shell(path)}", error))
    return found


def _there(recipes: list[Recipe], left_out: list[LeftOut]) -> list[Recipe]:
    """Recipes whose inputs are there; the others go to `left_out`."""
    from workbench.bricks.hub import HEADERS
    from workbench.resolve.resolve import resolve

    found = []
    for recipe in recipes:
        try:
            resolve(recipe, HEADERS)
            found.append(recipe)
        except WorkbenchError as error:
            left_out.append(LeftOut(recipe.name, error.message.splitlines()[0], error.hint, error))
    return found


def _none_left(left_out: list[LeftOut]) -> WorkbenchError:
    """Return the error of a command whose recipes are all left out: the first one's."""
    first = left_out[0].error or WorkbenchError(f"{left_out[0].name}: {left_out[0].reason}", left_out[0].hint)
    more = f"\nno recipe is left: {', '.join(one.name for one in left_out)}" if len(left_out) > 1 else ""
    return WorkbenchError(first.message + more, first.hint, first.exit_code)


def refuse_left_out(left_out: list[LeftOut]) -> None:
    """Tell by the exit code, after the output, that something is not in it. Raises WorkbenchError (exit 1) where that is so."""
    if left_out:
        names = ", ".join(dict.fromkeys(one.name for one in left_out))
        hints = dict.fromkeys(one.hint for one in left_out if one.hint)
        raise WorkbenchError(f"left out: {names}", "; ".join(hints) or None)


def told(left_out: list[LeftOut]) -> dict[str, Any]:
    """Return what a JSON document says about what is left out: nothing where all is there."""
    return {"left_out": [{"name": one.name, "reason": one.reason} for one in left_out]} if left_out else {}


def _comparable(recipes: list[Recipe]) -> list[Recipe]:
    """The recipes whose inputs are there, on the base and in the dtype of the first of them; says which are left out, and why."""
    from workbench.bricks.hub import HEADERS
    from workbench.evaluate.plans import scored_dtype
    from workbench.resolve.resolve import resolve

    kept: dict[tuple[str, str], list[Recipe]] = {}
    for recipe in recipes:
        try:
            resolved = resolve(recipe, HEADERS)
            kept.setdefault((resolved.base_digest, str(scored_dtype(resolved))), []).append(recipe)
        except WorkbenchError as error:
            out.say(f"left out: {recipe.name} ({error.message.splitlines()[0]})")
    first, *others = kept.values() or [[]]
    for recipe in (recipe for group in others for recipe in group):
        out.say(f"left out: {recipe.name} (another base or output dtype than {first[0].name})")
    if not first:
        raise WorkbenchError("no recipe whose inputs are there", "workbench plan RECIPE says what is missing.")
    return first


def imported_scores(
    names: list[str], suite: list[str] | None, runs_dir: Path | None
) -> tuple[list[Scores], ScoreStore, Path] | None:
    """Scores that `scores import` has kept under a suite of --suite, by name, the first one first; None where no such suite is named.

    Without names: all that were imported with the newest of them.
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
        raise WorkbenchError(
            f"--suite {' --suite '.join(suite)}: imported runs are compared on one suite at a time", "Name one suite.", 2
        )
    return find_imported(store, suite[0], names), store, project


def eval_command(
    names: list[str], suite: list[str] | None, settings: list[str] | None, limit: int | None, batch_size: int
) -> str:
    """The call of `eval` whose scores this call looks for."""
    options = [part for s in suite or () for part in ("--suite", s)] + [part for s in settings or () for part in ("--set", s)]
    options += ["--limit", str(limit)] if limit else []
    options += ["--batch-size", str(batch_size)] if batch_size != 32 else []
    return shell("workbench", "eval", *(dict.fromkeys(names) or ["RECIPE"]), *options)


def compare_scores(store: ScoreStore, scores: list[Scores], baseline: str | None, project: Path) -> Comparison:
    """The comparison, with the command line that makes it again."""
    from workbench.compare.compare import compare

    return compare(store, scores, baseline=baseline, project=project, command=shell("workbench", *sys.argv[1:]))

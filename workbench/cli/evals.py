"""`eval`, `compare` and `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli._comparison import rows_table, scores_table
from workbench.cli._options import (
    BatchOpt,
    DeviceOpt,
    JsonOpt,
    LimitOpt,
    QuietOpt,
    RecipesArg,
    RunsOpt,
    SetOpt,
    SuiteOpt,
    VerboseOpt,
)
from workbench.cli._output import out
from workbench.cli.run import recipe_path, relative
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.compare import Comparison
    from workbench.controls import Entry
    from workbench.recipe import Recipe
    from workbench.scores import Scores, Store
    from workbench.suites import Plan

BaselineOpt = Annotated[
    str | None, typer.Option("--baseline", help="Configuration that differences are taken against; default: the suite's.")
]


def evaluate(
    recipes: RecipesArg, settings: SetOpt = None, suite: SuiteOpt = None, device: DeviceOpt = "auto", batch_size: BatchOpt = 32,
    limit: LimitOpt = None, controls: Annotated[bool, typer.Option(help="Score the base, each brick alone and their average too.")] = True,
    runs_dir: RunsOpt = None, json: JsonOpt = False, quiet: QuietOpt = False, verbose: VerboseOpt = False,
) -> None:  # fmt: skip
    """Score recipes with lm-eval, and their controls once. Scores are kept by content: nothing is scored twice."""
    from workbench.controls import score_all
    from workbench.engine import pick_device

    out.quiet, out.verbose = quiet or json, verbose
    entries, plans, store = _open(recipes, settings, suite, runs_dir, controls, batch_size, limit, fetch=True)
    scores = score_all(entries, plans, store, device=pick_device(device), events=out.event)
    if json:
        out.json(_documents(scores))
        return
    comparison = _compare(store, scores, None, entries) if controls else None
    scores_table(comparison, scores)


def compare(
    recipes: RecipesArg, settings: SetOpt = None, suite: SuiteOpt = None, baseline: BaselineOpt = None, batch_size: BatchOpt = 32, limit: LimitOpt = None,
    runs_dir: RunsOpt = None, json: JsonOpt = False,
) -> None:  # fmt: skip
    """Compare scored recipes, paired item by item. Exit 3 if a named recipe is worse than the baseline on a primary metric."""
    from workbench.controls import stored

    entries, plans, store = _open(recipes, settings, suite, runs_dir, True, batch_size, limit)
    scores, missing = stored(entries, plans, store)
    named = [e.name for e in entries if e.role == "configuration"]
    if lacking := [name for name in missing if name in named or name == (baseline or "base")]:
        raise WorkbenchError(
            f"not scored yet on {', '.join(p.suite.suite for p in plans)}: {', '.join(lacking)}",
            f"workbench eval {' '.join(recipes)}" + _options(suite, settings, limit, batch_size),
        )
    found = _compare(store, scores, baseline, entries)
    document = found.document()
    if json:
        out.json({"baseline": document["baseline"], "rows": document["rows"]})
    else:
        rows_table(document)
    if any(row.configuration in named for row in found.worse):
        raise typer.Exit(3)


def report(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipes to show; default: all of recipes/ that are scored.", show_default=False)] = None,
    settings: SetOpt = None, suite: SuiteOpt = None, baseline: BaselineOpt = None,
    to: Annotated[Path, typer.Option("-o", "--out", help="The HTML file; .md and .json go beside it.")] = Path("reports/report.html"),
    batch_size: BatchOpt = 32, limit: LimitOpt = None, runs_dir: RunsOpt = None, quiet: QuietOpt = False,
) -> None:  # fmt: skip
    """Write the comparison as one offline HTML page, Markdown and JSON."""
    from workbench.controls import stored
    from workbench.report import render

    out.quiet = quiet
    names = recipes or [str(p) for p in sorted(Path("recipes").glob("*.yaml"))]
    if not names:
        raise WorkbenchError("no recipes/ here and none given", "workbench report recipes/NAME.yaml", 2)
    entries, plans, store = _open(names, settings, suite, runs_dir, True, batch_size, limit, lenient=not recipes)
    scores, missing = stored(entries, plans, store)
    if recipes and (lacking := [e.name for e in entries if e.name in missing and e.role == "configuration"]):
        raise WorkbenchError(
            f"not scored yet: {', '.join(lacking)}",
            f"workbench eval {' '.join(recipes)}" + _options(suite, settings, limit, batch_size),
        )
    if not scores:
        raise WorkbenchError("nothing is scored yet", "workbench eval RECIPE" + _options(suite, settings, limit, batch_size))
    if missing:
        out.say(f"not scored on every suite: {', '.join(missing)}")
    document = _compare(store, scores, baseline, entries).document()
    for path in render(document, to):
        out.line(str(relative(path)))


def _open(
    recipes: list[str], settings: list[str] | None, suite: list[str] | None, runs_dir: Path | None, controls: bool,
    batch_size: int, limit: int | None, lenient: bool = False, fetch: bool = False,
) -> tuple[list[Entry], list[Plan], Store]:  # fmt: skip
    """Recipes, their controls, the plans of their suites and the score store. `lenient` leaves out what cannot be resolved;
    `fetch` downloads inputs from the hub: stored scores are looked up without."""
    from workbench.controls import lineup, plans, suites_of
    from workbench.hub import Hub
    from workbench.recipe import load_recipe
    from workbench.scores import Store

    loaded = [load_recipe(recipe_path(name), settings or ()) for name in recipes]
    if lenient:
        loaded = _comparable(loaded)
    entries = lineup(loaded, controls, Hub(headers_only=not fetch, events=out.event))
    project = loaded[0].project
    chosen = suites_of(loaded, suite or [], project)
    store = Store((runs_dir or project / "runs") / "scores")
    return entries, plans(entries, chosen, batch_size=batch_size, limit=limit), store


def _comparable(recipes: list[Recipe]) -> list[Recipe]:
    """The recipes whose inputs are there, on the base and in the dtype of the first of them; says which are left out, and why."""
    from workbench.controls import scored_dtype
    from workbench.hub import HEADERS
    from workbench.resolve import resolve

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


def _options(suite: list[str] | None, settings: list[str] | None, limit: int | None, batch_size: int) -> str:
    """The options of this call that `eval` needs too, for its scores to be the ones looked for."""
    text = "".join(f" --suite {s}" for s in suite or ()) + "".join(f" --set {s}" for s in settings or ())
    return text + (f" --limit {limit}" if limit else "") + (f" --batch-size {batch_size}" if batch_size != 32 else "")


def _compare(store: Store, scores: list[Scores], baseline: str | None, entries: list[Entry]) -> Comparison:
    from workbench.compare import compare as compare_scores

    command = "workbench " + " ".join(sys.argv[1:])
    return compare_scores(store, scores, baseline=baseline, project=entries[0].resolved.recipe.project, command=command)


def _documents(scores: list[Scores]) -> Any:
    """The `eval --json` documents: one a suite, a list where there are several."""
    found: dict[str, dict[str, Any]] = {}
    for s in scores:
        document = found.setdefault(s.plan, {"suite": s.suite, "plan": s.plan, "configurations": []})
        document["configurations"].append({
            "name": s.configuration.name, "digest": s.configuration.digest,
            "tasks": {t: {"n": r.n, **{m: {"value": v.value, "low": v.low, "high": v.high} for m, v in r.metrics.items()}}
                      for t, r in s.tasks.items()}})  # fmt: skip
    return next(iter(found.values())) if len(found) == 1 else list(found.values())

"""Command `search`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.api.naming import load_named
from workbench.console.options import (
    BatchOpt,
    DeviceOpt,
    JsonOpt,
    LimitOpt,
    LogOpt,
    LogProjectOpt,
    QuietOpt,
    RecipeArg,
    RunsOpt,
    SetOpt,
    VerboseOpt,
)
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.console.watch import PortOpt, WatchOpt, check_watch, watching
from workbench.ground.errors import shell
from workbench.ground.project import relative

if TYPE_CHECKING:
    from workbench.search.result import CandidateVerdict, SearchResult, SearchState, Unbeaten
    from workbench.search.run import Search


@reads_recipes
def search(
    recipe: RecipeArg,
    settings: SetOpt = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials", min=1, help="Total number of candidates, including those of earlier calls; default: the recipe's."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="TIME", help="Total time, including earlier calls: 90s, 30m or 2h; default: the recipe's."
        ),
    ] = None,
    watch: WatchOpt = False,
    port: PortOpt = None,
    log: LogOpt = None,
    log_project: LogProjectOpt = None,
    to: Annotated[Path | None, typer.Option("-o", "--out", help="File to write the winner's recipe to.")] = None,
    device: DeviceOpt = "auto",
    batch_size: BatchOpt = 32,
    limit: LimitOpt = None,
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Search for the best values of a recipe's fields.

    Tries values of the fields under the recipe's `search`, in memory, and tests the best candidates on items that no
    candidate has seen. Run the same command again to resume, or in several processes to share the work.
    """
    from workbench.ground.project import runs_of
    from workbench.search.logged import runs_of_search
    from workbench.search.run import Scoring, prepare, run
    from workbench.search.winner import conclude
    from workbench.trackers.runs import log_runs, open_tracker

    out.quiet, out.verbose = quiet or json, verbose
    check_watch(watch, port)
    tracker = open_tracker(log, log_project)
    loaded = load_named(recipe, settings or (), out.say, runs_dir)
    scoring = Scoring(device, batch_size, limit)
    with watching("search", watch, port) as page:
        prepared = prepare(
            loaded,
            runs_dir or runs_of(loaded.project),
            scoring,
            trials=trials,
            budget=budget,
            events=page.event,
        )
        page.follow(partial(searched_so_far, prepared))
        for warning in prepared.warnings:
            out.warn(warning)
        run(prepared)
        found = conclude(prepared, to)
        page.follow(lambda: found)
    out.result(lambda: found, lambda: _say_result(found, to, loaded.project), json=json)
    if tracker:
        out.say(log_runs(tracker, runs_of_search(found)))


def searched_so_far(search: Search) -> SearchState | None:
    """Return the controls and candidates that are scored now, those of other processes among them; None before the first control."""
    from workbench.search.run import open_study
    from workbench.search.winner import growing

    if not search.controls:
        return None
    with closing(open_study(search)) as study:
        return growing(search, study)


def _say_result(found: SearchResult, to: Path | None, project: Path) -> None:
    """Print the result, and the commands that run the winners' recipes, or that there is no winner to write to `to`."""
    _table(found)
    if to is not None and not found.recipes:
        out.say(f"{to} was not written: there is no winner")
    for name, path in found.recipes.items():
        out.say(f"{name}: {shell('workbench', 'run', relative(project / path))}")


def _table(found: SearchResult) -> None:
    """Print the scores of tested candidates on search and test items, then the verdicts."""
    names = [objective.name for objective in found.objectives]
    columns = ["configuration", *(f"{name}: {half}" for name in names for half in ("search", "test"))]
    cells = [
        [row.name, *(f"{score:.3f}" for pair in zip(row.search, row.test, strict=True) for score in pair)]
        for row in found.test.rows
    ]
    out.table(columns, cells, right=range(1, len(columns)))
    searched = [trial for trial in found.trials if trial.arm == "search"]
    stopped = sum(bool(trial.stopped) for trial in searched)
    out.line(f"{len(searched)} candidates ({stopped} stopped early), sampler {found.sampler}")
    for o in found.objectives:
        out.line(
            f"{o.name}: {o.items.search} items in {o.clusters.search} clusters to search, {o.items.test} items in "
            f"{o.clusters.test} to test"
        )
    if found.unbeaten:
        out.line(_unbeaten(found.unbeaten, names))
    for line in found.guarded or ():
        out.line(line)
    rows = {row.name: row for row in found.test.rows if row.part != "control"}
    for name, against in found.test.against.items():
        for verdict in against:
            out.line(_verdict(name, found.best_control, verdict, len(names)))
        if twin := rows[name].same_as:
            out.line(f"{name} has the same weights as the control {twin}")


def _unbeaten(configurations: Sequence[Unbeaten], objectives: Sequence[str]) -> str:
    """Return the result of a search in which no candidate beats the controls."""
    texts = []
    for one in configurations:
        scores = (f"{name}: search {one.search[i]:.3f}, test {one.test[i]:.3f}" for i, name in enumerate(objectives))
        role = {"brick": "brick ", "average": "control ", "configuration": "recipe "}.get(one.role, "")
        texts.append(f"{role}{one.name} ({'; '.join(scores)})")
    return f"no candidate beats {' or '.join(texts)}: each scores less on search items, or loses too much on a guarded task"


def _verdict(name: str, control: str, found: CandidateVerdict, objectives: int) -> str:
    """Return the verdict on a tested candidate, with its differences on test and search items."""
    on = f" on {found.objective}" if objectives > 1 else ""
    if found.verdict == "no item changed":
        return f"{name} against {control}{on}: no item changed on test items"
    reason = f", {found.reason}" if found.reason else ""
    test = found.test
    interval = "" if test.low is None or test.high is None else f" [{test.low:+.3f}, {test.high:+.3f}]"
    return (
        f"{name} against {control}{on}: {found.verdict}{reason} (test {test.diff:+.3f}{interval}; search {found.search.diff:+.3f}, "
        f"so the search items overrate it by {found.optimism:+.3f})"
    )

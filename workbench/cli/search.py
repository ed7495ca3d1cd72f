"""Command `search`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.api.naming import load_named, relative
from workbench.cli._options import (
    BatchOpt,
    DeviceOpt,
    EngineOpt,
    JsonOpt,
    LimitOpt,
    LogOpt,
    LogProjectOpt,
    QuietOpt,
    RecipeArg,
    RunsOpt,
    SetOpt,
    VerboseOpt,
    WorkersOpt,
)
from workbench.cli._output import out
from workbench.cli._watch import PortOpt, WatchOpt, check_watch, watching_search
from workbench.errors import shell


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
    storage: Annotated[
        Path | None,
        typer.Option(
            "--storage",
            metavar="FILE",
            help="Journal file for the trials, or FILE.db for SQLite; default: a journal in the search's folder.",
        ),
    ] = None,
    engine: EngineOpt = "local",
    workers: WorkersOpt = None,
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
    from workbench.project import runs_of
    from workbench.report.trackers import log_runs, open_tracker, runs_of_search
    from workbench.search.cluster import Options, run_on_cluster
    from workbench.search.result import SearchResult
    from workbench.search.run import Scoring, prepare, run
    from workbench.search.winner import conclude

    out.quiet, out.verbose = quiet or json, verbose
    check_watch(watch, port, out.quiet)
    tracker = open_tracker(log, log_project)
    loaded = load_named(recipe, settings or (), out.say, runs_dir)
    scoring = Scoring(device, batch_size, limit)
    with watching_search(watch, port) as page:
        prepared = prepare(
            loaded,
            runs_dir or runs_of(loaded.project),
            scoring,
            trials=trials,
            budget=budget,
            storage=storage,
            events=page.event,
        )
        page.follow(prepared)
        for warning in prepared.warnings:
            out.warn(warning)
        if engine == "ray":
            assert loaded.path is not None  # a recipe without a file has no `search`
            place, runs = loaded.path.resolve(), prepared.folder.parent.parent.resolve()
            run_on_cluster(prepared, Options(place, tuple(settings or ()), runs, scoring), workers)
        else:
            run(prepared)
        document = conclude(prepared, to)
        page.end(document)
    out.result(lambda: SearchResult.model_validate(document), lambda: _say_result(document, to, loaded.project), json=json)
    if tracker:
        out.say(log_runs(tracker, runs_of_search(document)))


def _say_result(document: Mapping[str, Any], to: Path | None, project: Path) -> None:
    _table(document)
    _say_recipes(document, to, project)


def _say_recipes(document: Mapping[str, Any], to: Path | None, project: Path) -> None:
    """Print the commands that run the winners' recipes, or that there is no winner to write to `to`."""
    if to is not None and not document["recipes"]:
        out.say(f"{to} was not written: there is no winner")
    for name, path in document["recipes"].items():
        out.say(f"{name}: workbench run {shell(relative(project / path))}")


def _table(document: Mapping[str, Any]) -> None:
    """Print the scores of tested candidates on search and test items, then the verdicts."""
    names = [objective["name"] for objective in document["objectives"]]
    columns = ["configuration", *(f"{name}: {half}" for name in names for half in ("search", "test"))]
    cells = [
        [row["name"], *(f"{row[half][i]:.3f}" for i in range(len(names)) for half in ("search", "test"))]
        for row in document["test"]["rows"]
    ]
    out.table(columns, cells, right=range(1, len(columns)))
    searched = [t for t in document["trials"] if t["arm"] == "search"]
    stopped = sum(bool(t.get("stopped")) for t in searched)
    out.line(f"{len(searched)} candidates ({stopped} stopped early), sampler {document['sampler']}")
    for o in document["objectives"]:
        out.line(
            f"{o['name']}: {o['items']['search']} items in {o['clusters']['search']} clusters to search, {o['items']['test']} items in "
            f"{o['clusters']['test']} to test"
        )
    if document.get("unbeaten"):
        out.line(_unbeaten(document["unbeaten"], names))
    for found in document.get("guarded", ()):
        out.line(found)
    rows = {row["name"]: row for row in document["test"]["rows"] if row["part"] != "control"}
    for name, against in document["test"]["against"].items():
        for line in against:
            out.line(_verdict(name, document["best_control"], line, len(names)))
        if twin := rows[name]["same_as"]:
            out.line(f"{name} has the same weights as the control {twin}")


def _unbeaten(configurations: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> str:
    """Return the result of a search in which no candidate beats the controls."""
    texts = []
    for configuration in configurations:
        scores = (
            f"{name}: search {configuration['search'][i]:.3f}, test {configuration['test'][i]:.3f}"
            for i, name in enumerate(objectives)
        )
        role = {"brick": "brick ", "average": "control ", "configuration": "recipe "}.get(configuration["role"], "")
        texts.append(f"{role}{configuration['name']} ({'; '.join(scores)})")
    return f"no candidate beats {' or '.join(texts)}: each was worse on search items and stopped early, or loses too much on a guarded task"


def _verdict(name: str, control: str, line: Mapping[str, Any], objectives: int) -> str:
    """Return the verdict on a tested candidate, with its differences on test and search items."""
    on = f" on {line['objective']}" if objectives > 1 else ""
    reason = f", {line['reason']}" if line["reason"] else ""
    if line["verdict"] == "no item changed":
        return f"{name} against {control}{on}: no item changed on test items"
    return (
        f"{name} against {control}{on}: {line['verdict']}{reason} (test {_interval(line['test'])}; search {line['search']['diff']:+.3f}, "
        f"so the search items overrate it by {line['optimism']:+.3f})"
    )


def _interval(difference: Mapping[str, Any]) -> str:
    ends: Sequence[Any] = (difference["low"], difference["high"])
    return f"{difference['diff']:+.3f}" + ("" if None in ends else f" [{ends[0]:+.3f}, {ends[1]:+.3f}]")

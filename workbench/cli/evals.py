"""Commands `eval`, `compare` and `report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import Variation, recipe_files
from workbench.api.results import find_scores
from workbench.api.subjects import Opened, Request, imported_scores, open_subjects, refuse_left_out
from workbench.cli._recipes import command_line, compare_scores, printing
from workbench.console.options import (
    BaselineOpt,
    BatchOpt,
    DeviceOpt,
    EngineOpt,
    JsonOpt,
    LimitOpt,
    LogOpt,
    LogProjectOpt,
    MaxPointsOpt,
    QuietOpt,
    RehashOpt,
    RunsOpt,
    SetOpt,
    SubjectsArg,
    SuiteOpt,
    SweepOpt,
    VerboseOpt,
    WaitOpt,
    WorkersOpt,
)
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.console.watch import PortOpt, WatchOpt, check_watch, watching
from workbench.ground.errors import LeftOut, UsageError, WorkbenchError, nearest, shell
from workbench.ground.parts import hook
from workbench.ground.project import relative

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison


@reads_recipes
def evaluate(
    names: SubjectsArg,
    settings: SetOpt = None,
    sweep: SweepOpt = None,
    max_points: MaxPointsOpt = None,
    suite: SuiteOpt = None,
    baseline: BaselineOpt = None,
    device: DeviceOpt = "auto",
    batch_size: BatchOpt = 32,
    limit: LimitOpt = None,
    controls: Annotated[bool, typer.Option(help="Also score base, bricks, their average, and facts in the prompt.")] = True,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            envvar="WORKBENCH_SERVER",
            metavar="URL",
            help="URL of a server that serves the configurations by name, for suites with `backend: server`.",
        ),
    ] = None,
    engine: EngineOpt = "local",
    workers: WorkersOpt = None,
    wait: WaitOpt = None,
    watch: WatchOpt = False,
    port: PortOpt = None,
    log: LogOpt = None,
    log_project: LogProjectOpt = None,
    runs_dir: RunsOpt = None,
    rehash: RehashOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Score recipes and models with lm-eval.

    Also scores the controls. Nothing is scored twice: scores are stored by content, and several such commands at once share the work,
    as does, with --engine ray, a cluster whose nodes see this project at the same path. A recipe's finished run gets its scores into its README.md.
    """
    from workbench.cli._comparison import groups_table, recommended, scores_table, sweep_tables, unlisted
    from workbench.models.identity import pick_device
    from workbench.report.scorecard import card_scores
    from workbench.scores.documents import Skipped
    from workbench.scores.groups import aggregated, by_suite

    out.quiet, out.verbose = quiet or json, verbose
    check_watch(watch, port)
    tracks = hook("trackers", "--log") if log or log_project else None
    tracker = tracks.open_tracker(log, log_project) if tracks else None
    request = Request(names, Variation.of(settings, sweep, max_points), suite or (), runs_dir, controls, batch_size, limit, wait)
    opened = open_subjects(request, printing(), fetch=True, device=pick_device(device))
    against = opened.baseline(baseline)
    if baseline and against not in (known := [entry.name for entry in opened.entries]):  # before anything is scored
        raise UsageError(f"--baseline {baseline}: not one of the scored configurations. {nearest(baseline, known)}")
    with watching("evaluation", watch, port, partial(scored_so_far, opened, against)) as page:
        if engine == "local":
            scores = opened.scored(device, server, page.event)
        else:
            scores = opened.scored_on_cluster(request, device, server, workers, page.event)
    compared = len(opened.entries) > 1 and (controls or baseline or not any(e.resolved.recipe.path for e in opened.entries))
    comparison = compare_scores(opened.store, scores, against, opened.project, opened.sweeps) if compared else None
    for card in card_scores(opened.entries, scores, comparison, opened.runs, out.warn):
        out.say(f"scores added to {relative(card)}")
    groups = {(s.suite, s.configuration.name): aggregated(opened.store.record(s), s) for s in scores}

    def text() -> None:
        scores_table(comparison, scores)
        groups_table([(name, group) for (_, name), found in groups.items() for group in found])
        if comparison is not None:
            sweep_tables(comparison)
            again = request.eval_command.removeprefix("workbench eval")
            if number := unlisted(comparison):
                out.say(f"{number} more configurations: workbench compare{again}")
            out.say(f"page: workbench report{again}")
            recommended(comparison)

    warnings = comparison.warnings if comparison else ()
    out.result(lambda: by_suite(scores, groups, Skipped.all(opened.left_out)), text, json=json, warnings=warnings)
    if tracks and tracker:
        out.say(tracks.log_runs(tracker, tracks.runs_of_scores(opened.entries, scores)))
    refuse_left_out(opened.left_out)


def scored_so_far(opened: Opened, against: str | None) -> Comparison | None:
    """Return the comparison of all scores of an evaluation that are stored now; None before there are two configurations."""
    from workbench.evaluate.scoring import stored

    scores, missing = stored(opened.entries, opened.plans, opened.store, against)
    if len({s.configuration.name for s in scores}) < 2:
        return None
    comparison = compare_scores(opened.store, scores, against, opened.project, opened.sweeps)
    return comparison.warned([f"Not scored yet: {', '.join(missing)}."] if missing else [])


@reads_recipes
def compare(
    names: SubjectsArg,
    settings: SetOpt = None,
    sweep: SweepOpt = None,
    max_points: MaxPointsOpt = None,
    suite: SuiteOpt = None,
    baseline: BaselineOpt = None,
    batch_size: BatchOpt = 32,
    limit: LimitOpt = None,
    require_safe: Annotated[
        bool,
        typer.Option("--require-safe", help="Also exit with 3 if a named configuration is not shown safe on a guarded task."),
    ] = False,
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
) -> None:
    """Compare stored scores with a baseline, paired item by item, and recommend a configuration.

    Prints all configurations, of which `eval` shows the five best. Takes recipes, models, or runs imported under --suite. If exactly two are named without --baseline, the second is
    compared with the first; the recommendation and the guarded tasks are still held against the suite's baseline. Exits
    with 3 if a named configuration is worse than its baseline on a primary metric, guarded tasks included; with
    --require-safe, also if one is not shown safe on a guarded task. Otherwise exits with 1 if a configuration is left out
    because it is invalid or not scored.
    """
    from workbench.cli._comparison import costs_table, recommended, rows_table, sweep_tables
    from workbench.compare.comparison import ComparedRows
    from workbench.scores.documents import Skipped

    vary = Variation.of(settings, sweep, max_points)
    found = find_scores(Request(names, vary, suite or (), runs_dir, True, batch_size, limit), baseline, printing())
    named, pair, left_out = found.named, found.pair, found.left_out
    whole = found.compared(command_line())
    two = found.paired(whole, command_line())

    def text() -> None:
        sweep_tables(whole)
        rows_table(two, pair)
        costs_table(two.costs(pair))
        out.line("")
        recommended(whole)

    out.result(lambda: ComparedRows.of(whole, two, pair, Skipped.all(left_out)), text, json=json)
    lines = _gate(two, named, require_safe)
    lines += [] if two is whole else [line for line in _gate(whole, named, require_safe, guarded=True) if line not in lines]
    if lines:
        for line in lines:
            out.say(line)
        raise typer.Exit(3)
    refuse_left_out(left_out)


def _gate(comparison: Comparison, named: Sequence[str], require_safe: bool, guarded: bool = False) -> list[str]:
    """Return the reasons for exit status 3, one line per configuration."""
    from workbench.cli._comparison import gate_lines

    worse = [row for row in comparison.worse if row.configuration in named and (row.family == "guarded" or not guarded)]
    not_safe = [row for row in comparison.not_safe if row.configuration in named] if require_safe else []
    return gate_lines(worse, not_safe, comparison.baseline)


@reads_recipes
def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Recipes, models or imported runs; default: all scored recipes in recipes/, or all runs imported under --suite.",
            show_default=False,
        ),
    ] = None,
    settings: SetOpt = None,
    sweep: SweepOpt = None,
    max_points: MaxPointsOpt = None,
    suite: SuiteOpt = None,
    baseline: BaselineOpt = None,
    to: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write; the .md and .json files go beside it.")] = Path(
        "reports/report.html"
    ),
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="DIR", help="Also write every table as CSV, with full precision, into this folder."),
    ] = None,
    latex: Annotated[
        Path | None, typer.Option("--latex", metavar="DIR", help="Also write every table as LaTeX (booktabs) into this folder.")
    ] = None,
    batch_size: BatchOpt = 32,
    limit: LimitOpt = None,
    runs_dir: RunsOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Write a comparison of scores as HTML page, Markdown and JSON, and its tables as files.

    The page works offline, and its buttons save each table, and each figure as SVG and PNG. The folders of --csv and --latex may be one; a file
    that this command did not write is never replaced. A recipe's finished search gets a page beside it. Exits with 1 if a recipe is left
    out because it is invalid, or because it is named and not scored.
    """
    from workbench.report import render
    from workbench.report.files import check_folders, save

    out.quiet = quiet
    check_folders({"--csv": csv, "--latex": latex})
    left_out: list[LeftOut] = []
    searches = hook("searches")
    request = Request(names or [], Variation.of(settings, sweep, max_points), suite or (), runs_dir, True, batch_size, limit)
    if imported_scores(request):
        comparison: Comparison | None = find_scores(request, baseline).compared(command_line())
        pages: Mapping[str, Any] = {}
    else:
        every = names or list(map(str, recipe_files()))
        if not every:
            raise UsageError("no recipe is named, and there is none in recipes/", "Name one: workbench report recipes/NAME.yaml")
        pages, unsearched = searches.searched(every, settings, runs_dir) if searches else ({}, [])
        opened = open_subjects(replace(request, names=every), printing(), lenient=not names, skip=True)
        left_out = opened.left_out
        comparison = stored_comparison(opened, names, baseline, request.eval_command, pages, unsearched)
    written = (render(comparison, to) if comparison else []) + (searches.write_pages(pages, to) if pages else [])
    for path in written:
        out.line(str(relative(path)))
    saved = save([path for path in written if path.suffix == ".html"], {"csv": csv, "tex": latex})
    for folder in dict.fromkeys(path.parent for path in saved):
        out.say(f"{sum(path.parent == folder for path in saved)} files in {relative(folder)}")
    refuse_left_out(left_out)


def stored_comparison(
    opened: Opened,
    names: list[str] | None,
    baseline: str | None,
    hint: str,
    pages: Mapping[str, Any],
    unsearched: list[str],
) -> Comparison | None:
    """Compare the stored scores; named configurations without scores are left out."""
    from workbench.evaluate.scoring import stored
    from workbench.scores.documents import Skipped

    against = opened.baseline(baseline)
    scores, missing = stored(opened.entries, opened.plans, opened.store, against)
    configurations = [e.name for e in opened.entries if e.role == "configuration"]
    if names and (lacking := [name for name in configurations if name in missing and name not in pages]):
        also = [f"{shell('workbench', 'search', name)} (to report its search alone)" for name in lacking if name in unsearched]
        again = "; ".join([hint, *also])
        earlier = opened.store.elsewhere(opened.plans, lacking)
        if len(lacking) == len(configurations) or (against or "base") in missing:
            raise WorkbenchError(f"not scored yet: {', '.join(lacking)}{earlier}", again)
        out.warn(f"left out: {', '.join(lacking)} (not scored yet{earlier})")
        opened.left_out.extend(LeftOut(name, f"not scored yet{earlier}", again) for name in lacking)
    shown = {s.configuration.name for s in scores}
    if pages and (not scores or (names and not shown.intersection(configurations))):
        return None
    if not scores:
        raise WorkbenchError("nothing is scored yet", hint)
    if missing:
        out.say(f"not scored on every suite: {', '.join(missing)}")
    warnings = [f"Left out: {one.name}: {one.reason}." for one in opened.left_out]
    comparison = compare_scores(opened.store, scores, against, opened.project, opened.sweeps)
    return comparison.warned(warnings, Skipped.all(opened.left_out))

"""Command `ship`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.api.naming import recipe_files
from workbench.api.results import find_scores
from workbench.api.subjects import Request, imported_scores, open_subjects
from workbench.cli._recipes import command_line, load, printing
from workbench.console.options import BaselineOpt, BatchOpt, DeviceOpt, JsonOpt, LimitOpt, QuietOpt, RunsOpt, VerboseOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison


@reads_recipes
def ship(
    suite: Annotated[
        str | None,
        typer.Argument(
            metavar="SUITE", help="Suite whose scores decide; default: those of the recipes' `eval`.", show_default=False
        ),
    ] = None,
    baseline: BaselineOpt = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    device: DeviceOpt = "auto",
    batch_size: BatchOpt = 32,
    limit: LimitOpt = None,
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Run the recommended configuration, without its name.

    Compares the stored scores of all recipes in recipes/, as `workbench report` does, and says what is recommended and why.
    Then does what `workbench run` of the printed line does; with --json only if --yes is given. Exits with 3 if no configuration can be
    recommended.
    """
    from workbench.cli._comparison import recommended
    from workbench.cli.evals import stored_comparison
    from workbench.cli.run import run
    from workbench.compare.recommend import ShippedConfiguration

    out.quiet, out.verbose = quiet or json, verbose
    request = Request([], suites=[suite] if suite else (), runs=runs_dir, batch_size=batch_size, limit=limit)
    if imported_scores(request):
        comparison: Comparison | None = find_scores(request, baseline).compared(command_line())
    else:
        request = replace(request, names=list(map(str, recipe_files())))
        opened = open_subjects(request, printing(), lenient=True, skip=True)
        comparison = stored_comparison(opened, None, baseline, request.eval_command, {}, [])
    assert comparison is not None, "only pages of searches can stand alone"
    found, made = comparison.recommendation, None
    words = shlex.split(found.command[0].partition(" --runs-dir ")[0]) if found and found.command else []
    if json and yes and words[1:2] == ["run"]:
        from workbench.run.device import Work, device_of_run
        from workbench.run.execute import execute

        resolved, runs = load(words[2], words[4::2], runs_dir)
        made = execute(resolved, runs, Work(device_of_run(device, resolved), None, out.event)).place
    kept = next((c.kept_mean for c in comparison.configurations if found and c.name == found.configuration), None)
    shipped = ShippedConfiguration(recommendation=found, kept=kept, made=made)
    out.result(lambda: shipped, lambda: recommended(comparison), json=json)
    if found is None or found.configuration is None:
        raise typer.Exit(3)
    if not words:
        raise WorkbenchError(f"{found.configuration} cannot be made here", "Score a recipe that makes it: workbench eval RECIPE")
    if json:
        return
    if words[1] != "run":
        out.say(f"{found.configuration} is there already: nothing has to be run")
        return
    if not yes and not typer.confirm(f"Run it? {found.command[0]}"):
        raise WorkbenchError("nothing was run", "workbench ship --yes runs it without asking.")
    run(words[2], words[4::2], device=device, runs_dir=runs_dir, quiet=quiet, verbose=verbose)
    for line in found.command[1:]:
        out.say(line)

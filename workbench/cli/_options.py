"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArg = Annotated[Path, typer.Argument(help="A recipe file, or the name of recipes/NAME.yaml.", show_default=False)]
RecipesArg = Annotated[list[str], typer.Argument(help="Recipe files, or names of recipes/NAME.yaml.", show_default=False)]
SubjectsArg = Annotated[
    list[str],
    typer.Argument(
        help="Recipe files or names of recipes/NAME.yaml, model directories, hub ids org/name[@rev].",
        metavar="RECIPE_OR_MODEL",
        show_default=False,
    ),
]
BaselineOpt = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        help="Configuration that differences are taken against; default: the suite's, or the first of several models.",
    ),
]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="STEP.FIELD=VALUE", help="Override a field of the recipe; may be repeated.")
]
DeviceOpt = Annotated[str, typer.Option("--device", envvar="WORKBENCH_DEVICE", help="auto, cpu, cuda or cuda:N.")]
RunsOpt = Annotated[
    Path | None,
    typer.Option(
        "--runs-dir", envvar="WORKBENCH_RUNS_DIR", help="Where runs and scores are kept; default: runs/ of the project."
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ThreadsOpt = Annotated[int | None, typer.Option("--threads", min=1, help="Tensors computed at a time; default: one a core.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print data and errors only.")]
VerboseOpt = Annotated[bool, typer.Option("--verbose", "-v", help="Print every progress event.")]
SuiteOpt = Annotated[
    list[str] | None, typer.Option("--suite", help="A suite of evals/suites instead of the recipe's `eval`; may be repeated.")
]
BatchOpt = Annotated[int, typer.Option("--batch-size", min=1, help="Requests a forward pass.")]
LimitOpt = Annotated[int | None, typer.Option("--limit", min=1, help="So many items a task: a quick look, marked partial.")]

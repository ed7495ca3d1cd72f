"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from workbench.ground.errors import RUNS_DIR

RecipeArg = Annotated[
    str,
    typer.Argument(
        help="Recipe: a file, NAME for recipes/NAME.yaml, or NAME[POINT] for a point of its sweep; or a run or model.",
        show_default=False,
    ),
]
RecipesArg = Annotated[
    list[str],
    typer.Argument(help="Recipes: files, NAME for recipes/NAME.yaml, or NAME[POINT] for a point of a sweep.", show_default=False),
]
SubjectsArg = Annotated[
    list[str],
    typer.Argument(
        help="Recipes (files, NAME for recipes/NAME.yaml, NAME[POINT] of a sweep), runs, model directories, GGUF files, hub ids (org/name[@revision]).",
        metavar="RECIPE_OR_MODEL",
        show_default=False,
    ),
]
BaselineOpt = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        help="Configuration to compare with; default: the suite's baseline, or the first model if no recipe is named.",
    ),
]
FactsArg = Annotated[
    Path,
    typer.Argument(
        help="Facts file (JSONL or YAML), or a published dataset: CounterFact, zsRE, KnowEdit, MQuAKE, WikiBigEdit, RippleEdits, "
        "QAEdit, UnKEBench, EditEverything.",
        show_default=False,
    ),
]
BrickArg = Annotated[str, typer.Argument(help="Brick: a directory, or its name in bricks/.", show_default=False)]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="STEP.FIELD=VALUE",
        help="Override a recipe field: mix.density=0.3 or 0.density=0.3 (step by id or index), seed=1. A new method, such as "
        "mix.merge=tsv, drops the fields that it lacks. Repeatable.",
    ),
]
DeviceOpt = Annotated[
    str, typer.Option("--device", envvar="WORKBENCH_DEVICE", help="Device for computation: auto, cpu, cuda or cuda:N.")
]


def _repeated(context: typer.Context, value: Path | None) -> Path | None:
    """Let printed commands repeat the option if it was typed; a variable of the environment holds for them anyway."""
    RUNS_DIR.set(value if "COMMANDLINE" in str(context.get_parameter_source("runs_dir")) else None)
    return value


RunsOpt = Annotated[
    Path | None,
    typer.Option(
        "--runs-dir",
        envvar="WORKBENCH_RUNS_DIR",
        callback=_repeated,
        help="Directory for runs and scores; default: runs/ in the project.",
    ),
]
SweepOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="STEP.FIELD=V,V",
        help="Vary a recipe field, one configuration for each value: mix.lambda=0.25,0.5,1, mix.merge=ties,dare, "
        "mix.bricks=[a,b],[a,b,c], seed=0,1,2. Repeatable, for all combinations.",
    ),
]
MaxPointsOpt = Annotated[
    int | None,
    typer.Option("--max-points", min=1, metavar="N", help="Accept sweeps of at most N configurations; default: 64."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def _rehash(value: bool) -> bool:
    """Forget remembered digests if the option is set."""
    if value:
        from workbench.weights.digests import rehash

        rehash()
    return value


RehashOpt = Annotated[
    bool,
    typer.Option(
        "--rehash",
        callback=_rehash,
        help="Read all weights again, instead of trusting digests that are remembered under the files' times.",
    ),
]
ThreadsOpt = Annotated[
    int | None, typer.Option("--threads", min=1, help="Tensors to compute in parallel; default: one per core, at most 8.")
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print data and errors only.")]
VerboseOpt = Annotated[bool, typer.Option("--verbose", "-v", help="Print every progress event.")]
SuiteOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--suite", help="Suite to use instead of the recipe's `eval`: NAME for evals/suites/NAME.yaml, or a file. Repeatable."
    ),
]
BatchOpt = Annotated[int, typer.Option("--batch-size", min=1, help="Requests per forward pass.")]
LimitOpt = Annotated[
    int | None, typer.Option("--limit", min=1, help="Score at most N items per task; the result is marked as partial.")
]
EngineOpt = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="local, or ray: use the cluster of RAY_ADDRESS, or several processes on this machine."),
]
WaitOpt = Annotated[
    float | None,
    typer.Option(
        "--wait",
        metavar="SECONDS",
        min=0,
        help="How long to wait for another process that scores the same; default: until it ends. Other configurations come first.",
    ),
]
LogOpt = Annotated[
    Literal["mlflow", "wandb"] | None,
    typer.Option(
        "--log",
        help="When all scores are stored, log each result as a run to MLflow or Weights & Biases: pip install 'brick-workbench[log]'.",
    ),
]
LogProjectOpt = Annotated[
    str | None,
    typer.Option(
        "--log-project",
        metavar="NAME",
        help="Project (MLflow: experiment) of --log; default: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else workbench.",
    ),
]
WorkersOpt = Annotated[
    int | None, typer.Option("--workers", min=1, help="Workers of `--engine ray`; default: one per GPU, or one per two CPUs.")
]

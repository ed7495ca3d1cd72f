"""The command line. Heavy imports stand inside commands: `--help` loads no torch."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated, NoReturn

import typer

from workbench.cli import (
    brick,
    chat,
    doctor,
    edit,
    evals,
    experts,
    facts,
    memory,
    methods,
    recipe,
    run,
    runs,
    scores,
    search,
    suite,
)
from workbench.cli._failures import explained, while_printing
from workbench.cli._output import out
from workbench.errors import WorkbenchError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge, edit and grow language models from YAML recipes, and score the results.",
    epilog="First steps: workbench brick fetch starter; workbench eval recipes/starter-ties.yaml --suite smoke; workbench report",
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        out.line(f"brick-workbench {version('brick-workbench')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


app.command("plan")(run.plan)
app.command("run")(run.run)
app.command("eval")(evals.evaluate)
app.command("compare")(evals.compare)
app.command("report")(evals.report)
app.command("search")(search.search)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)
app.command("experts")(experts.experts)
app.add_typer(recipe.app, name="recipe")
app.add_typer(brick.app, name="brick")
app.add_typer(suite.app, name="suite")
app.add_typer(scores.app, name="scores")
app.add_typer(facts.app, name="facts")
app.add_typer(edit.app, name="edit")
app.add_typer(runs.app, name="runs")
app.add_typer(memory.app, name="memory")
app.command("methods")(methods.methods)


def main() -> None:
    """Entry point: errors become messages and exit codes in this one place."""
    # Imports make objects that stay: looking at them again and again costs 0.1 s at every start.
    gc.set_threshold(20_000, 10, 10)
    silence()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk behind the standard output shows here
    except WorkbenchError as error:
        _fail(error)
    except KeyboardInterrupt:
        out.stop()
        out.say("interrupted; the same command goes on where it stopped")
        sys.exit(130)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno is not None and while_printing(error):
            error.filename = "standard output"
        _drop_output()
        _fail(explained(error))
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            what = f"out of memory on the device: {str(error).splitlines()[0]}"
            _fail(WorkbenchError(what, "--device cpu, or a smaller --batch-size"))
        if "home directory" in str(error):  # pathlib, where neither HOME nor the user's entry says it
            _fail(WorkbenchError("~: this user has no home folder", "Set HOME, or write the whole path in place of ~."))
        raise


def _fail(error: WorkbenchError) -> NoReturn:
    """Show an error and end with its exit code; with WORKBENCH_DEBUG=1 the traceback instead."""
    if os.environ.get("WORKBENCH_DEBUG") == "1":
        raise
    out.error(error)
    sys.exit(error.exit_code)


def _drop_output() -> None:
    """Let what is still to be printed go nowhere, so that the interpreter does not fail on it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def silence() -> None:
    """Quieten the libraries below, before they are imported. The user's own settings win."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DATASETS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)

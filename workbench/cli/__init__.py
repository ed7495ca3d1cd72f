"""The command line.

Commands import heavy libraries in their bodies, so that `--help` loads no torch.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from workbench.cli import (
    analyze,
    brick,
    chat,
    doctor,
    edit,
    evals,
    experts,
    export,
    facts,
    memory,
    push,
    recipe,
    route,
    run,
    runs,
    scores,
    search,
    suite,
    trust,
)
from workbench.cli._failures import command_of, explained, missing_extra, short_of_memory, while_printing
from workbench.cli._output import out
from workbench.cli.trust import reads_recipes
from workbench.errors import WorkbenchError


class _Commands(TyperGroup):
    """All commands; Ctrl-C ends each with a message, which typer would not print."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            out.stop()
            out.say("interrupted; run the same command again to resume")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge, edit and grow language models from YAML recipes, and score the results.\n\n"
    "A recipe names a base model, bricks (LoRA adapters, fine-tuned checkpoints, edits) and the steps that combine them.",
    epilog="First steps with your own models: workbench recipe new mine --project DIR --base MODEL --brick NAME=MODEL --brick NAME=MODEL\n\n"
    "In a clone: workbench brick fetch starter; workbench eval recipes/starter-ties.yaml --suite smoke; workbench report",
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


app.command("plan")(reads_recipes(run.plan))
app.command("run")(reads_recipes(run.run))
app.command("eval")(reads_recipes(evals.evaluate))
app.command("compare")(reads_recipes(evals.compare))
app.command("report")(reads_recipes(evals.report))
app.command("search")(reads_recipes(search.search))
app.command("chat")(reads_recipes(chat.chat))
app.command("push")(push.push)
app.command("doctor")(doctor.doctor)
app.command("trust")(trust.trust)
app.command("experts")(reads_recipes(experts.experts))
app.add_typer(analyze.app, name="analyze")
app.add_typer(recipe.app, name="recipe")
app.add_typer(brick.app, name="brick")
app.add_typer(suite.app, name="suite")
app.add_typer(scores.app, name="scores")
app.add_typer(facts.app, name="facts")
app.add_typer(edit.app, name="edit")
app.add_typer(runs.app, name="runs")
app.add_typer(export.app, name="export")
app.add_typer(memory.app, name="memory")
app.add_typer(route.app, name="route")
app.command("methods")(reads_recipes(recipe.methods))


def main() -> None:
    """Run the command line, and turn errors into messages and exit codes."""
    silence()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # raises here if stdout is a file on a full disk
    except WorkbenchError as error:
        _fail(error)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if short_of_memory(error):
            raise
        if error.filename is None and error.errno is not None and while_printing(error):
            error.filename = "standard output"
        _drop_output()
        _fail(explained(error))
    except ImportError as error:
        if extra := missing_extra(error, command_of(sys.argv[1:], [group.name or "" for group in app.registered_groups])):
            _fail(extra)
        raise
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            what = f"out of memory on the device: {str(error).splitlines()[0]}"
            _fail(WorkbenchError(what, "Use --device cpu or a smaller --batch-size."))
        if "home directory" in str(error):  # raised by pathlib if neither HOME nor the user database names a home folder
            _fail(WorkbenchError("~: this user has no home folder", "Set HOME, or write the full path instead of ~."))
        raise


def _fail(error: WorkbenchError) -> NoReturn:
    """Print an error and exit with its exit code; with WORKBENCH_DEBUG=1, raise it again for its traceback."""
    if os.environ.get("WORKBENCH_DEBUG") == "1":
        raise
    out.error(error)
    sys.exit(error.exit_code)


def _drop_output() -> None:
    """Discard output that is still buffered, so that the interpreter does not fail on it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def silence() -> None:
    """Silence libraries through environment variables, before they are imported. Variables that the user has set stay."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DATASETS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)

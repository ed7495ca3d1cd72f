"""The program `workbench`: its commands, and its errors as messages and exit codes."""

from __future__ import annotations

import os
import re
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from workbench.cli.index import Commands, groups
from workbench.console.failures import command_of, explained, missing_extra, of_foreign, short_of_memory, while_printing
from workbench.console.output import out
from workbench.ground.errors import RUNS_DIR, WorkbenchError, shell

_ELSEWHERE = {
    **dict.fromkeys(("merge", "make", "build", "apply"), "run RECIPE"),
    **dict.fromkeys(("train", "finetune", "sft"), "brick train NAME --data FILE"),
    **dict.fromkeys(("score", "evaluate", "lm_eval", "lm-eval"), "eval RECIPE --suite NAME"),
    **dict.fromkeys(("generate", "infer"), "chat RECIPE"),
    **dict.fromkeys(("mergekit-yaml", "mergekit-moe", "mergekit-multi"), "recipe import FILE -o RECIPE"),
    **dict.fromkeys(("convert", "inspect", "info", "import", "load"), "open PATH"),
    **dict.fromkeys(("init", "new"), "recipe new NAME --project DIR"),
    **dict.fromkeys(("ls", "list", "show"), "runs ls"),
    **dict.fromkeys(("merge_and_unload", "bake"), "brick bake BRICK -o DIR"),
    **dict.fromkeys(("upload", "publish"), "push RECIPE ORG/NAME"),
    "download": "brick fetch",
    "schema": "recipe schema",
}
"""A word that users of other tools type -> the command here."""


class _Commands(TyperGroup):
    """All commands; Ctrl-C ends each with a message, which typer would not print."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "commands": Commands()})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command; the error for a word of another tool names the command for it."""
        if args[0] in _ELSEWHERE:
            meant = re.sub(
                r"\b(RECIPE|FILE|PATH|NAME|BRICK)\b",
                lambda m: shell(*args[1:2]) if args[1:2] and args[1][0] != "-" else m[1],
                _ELSEWHERE[args[0]],
                count=1,
            )
            ctx.fail(f"No such command '{args[0]}'. Did you mean `workbench {meant}`?")
        ctx.meta["words"] = args
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        typed = RUNS_DIR.set(None)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            out.stop()
            out.say("interrupted; run the same command again to resume")
            raise typer.Exit(130) from None
        except typer.Abort:  # the end of the input, or Ctrl-C at a question
            raise WorkbenchError("nothing was done: the question has no answer", "Add --yes to the command.") from None
        except WorkbenchError as error:
            if foreign := of_foreign(error, ctx.meta.get("words", ())):
                raise foreign from error
            raise
        finally:
            RUNS_DIR.reset(typed)


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
    out.begin()


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
        if extra := missing_extra(error, command_of(sys.argv[1:], groups())):
            _fail(extra)
        raise
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            what = f"out of memory on the device: {str(error).splitlines()[0]}"
            _fail(WorkbenchError(what, "Use --device cpu or a smaller --batch-size."))
        if str(error).startswith("Symlink loop from "):  # raised by pathlib before Python 3.13
            _fail(WorkbenchError(f"{str(error)[18:]}: the symbolic link leads to itself", "Remove it, or name another file."))
        if "home directory" in str(error):  # raised by pathlib if neither HOME nor the user database names a home folder
            _fail(WorkbenchError("~: this user has no home folder", "Set HOME, or write the full path instead of ~."))
        raise


def _fail(error: WorkbenchError) -> NoReturn:
    """Print an error and exit with its exit code; with WORKBENCH_DEBUG=1, raise it again for its traceback."""
    if os.environ.get("WORKBENCH_DEBUG") == "1":
        raise
    error = short_of_memory(error) or error  # a library's model or a task is not to blame for what it was refused
    out.error(error)
    sys.exit(error.exit_code)


def _drop_output() -> None:
    """Discard output that is still buffered, so that the interpreter does not fail on it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def silence() -> None:
    """Silence libraries and their plug-ins through environment variables, before they are imported. Variables that the user has set stay."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DATASETS_VERBOSITY": "error",
        "PYDANTIC_DISABLE_PLUGINS": "__all__",  # pydantic would look for some in every installed distribution
    }.items():
        os.environ.setdefault(name, value)

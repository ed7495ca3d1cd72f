"""Write docs/commands.md and docs/commands/ from the command line itself: the help text of every command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from cells import table
from typer.testing import CliRunner

from workbench.cli.app import app

HEAD = """# Commands

Generated from the command line by `make docs`. A recipe is a file, or the name of one in `recipes/`; a brick is a directory, or the name of one in `bricks/`. Recipes and suites
hold what decides numbers; options say where and how much. `--set mix.density=0.3` overrides a field for one call. `--json` prints one document: [json.md](json.md) lists its fields.

Options of many commands are described [below](#common-options) alone.

Exit status: 0 done; 1 an error, with a hint that repairs it; 2 wrong usage or an invalid recipe; 3 a check that failed; 130 interrupted."""
WIDTH = "110"
COMMON = {
    "--json": "Print the result as one JSON document.",
    "-q, --quiet": "Print data and errors only.",
    "--device": "Device for computation: `auto`, `cpu`, `cuda` or `cuda:N`; also `WORKBENCH_DEVICE`. Default: auto.",
    "--runs-dir": "Directory for runs and scores; also `WORKBENCH_RUNS_DIR`. Default: runs/ in the project.",
    "--trust-project-code": "Run the project's own Python code (methods/, evals/) with your rights. See [`workbench trust`](commands/trust.md).",
}
"""Options that many commands have, with the text that stands on the page of commands instead of each command's own."""


def command_pages() -> dict[str, str]:
    """Return docs/commands.md and one page for each command or group of commands: name -> text."""
    commands = list(_commands(typer.main.get_command(app)))
    rows = [[f"[`workbench {name}`]({_page(name)}#{_slug(name)})", _summary(command)] for name, command in commands]
    common = table(["option", "meaning"], [[f"`{name}`", text] for name, text in COMMON.items()], left=2)
    parts = [HEAD, table(["command", "what it does"], rows, left=2), "## Common options", common]
    found = {"commands.md": "\n\n".join(parts) + "\n"}
    for group in dict.fromkeys(name.partition(" ")[0] for name, _ in commands):
        names = [name for name, _ in commands if name.partition(" ")[0] == group]
        title = f"workbench {group}"
        sections = [f"## workbench {name}\n\n{_help(name)}" for name in names]
        if names == [group]:
            sections = [sections[0].partition("\n\n")[2]]
        found[_page(group)] = "\n\n".join([f"# {title}", *sections]) + "\n"
    return found


def _page(name: str) -> str:
    return f"commands/{name.partition(' ')[0]}.md"


def _slug(name: str) -> str:
    """Return the anchor of a command's heading."""
    return f"workbench-{name.replace(' ', '-')}"


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and the object of every command, in the order of `workbench --help`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _summary(command: Any) -> str:
    """Return the first sentence of a command's help text, without its full stop."""
    first = " ".join((command.help or "").strip().partition("\n\n")[0].split())
    return first.partition(". ")[0].removesuffix(".")


def _help(name: str) -> str:
    """Return the help text that a command prints as a code block, and below it the names of the options that many commands have."""
    printed = CliRunner().invoke(
        app, [*name.split(), "--help"], env={"COLUMNS": WIDTH, "TERMINAL_WIDTH": WIDTH}, prog_name="workbench"
    )
    entries: list[list[str]] = []  # lines of the help text, those of one option together
    for line in printed.output.rstrip().splitlines():
        if entries and entries[-1][0].startswith("  -") and line.startswith("     "):
            entries[-1].append(line.rstrip())
        else:
            entries.append([line.rstrip()])
    common = [option for lines in entries for option in COMMON if re.match(rf"  {option}(?= |$)", lines[0])]
    own = [lines for lines in entries if not re.match(rf"  (--help|{'|'.join(COMMON)})(?= |$)", lines[0])]
    text = "\n".join(line for lines in own for line in lines).strip().removesuffix("\n\nOptions:")
    also = f"\n\n[Also](../commands.md#common-options): {', '.join(f'`{option}`' for option in common)}." if common else ""
    return f"```text\n{text}\n```{also}"

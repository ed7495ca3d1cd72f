"""The command line in this process: what it prints, the document of `--json`, the error that it raises."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from worlds.places import PARTS

from workbench.cli.app import app
from workbench.cli.index import COMMANDS
from workbench.ground.errors import WorkbenchError
from workbench.ground.parts import parts


def is_here(command: str) -> bool:
    """Whether the core or a part that is not missing has a command, such as "export write"."""
    owner = COMMANDS.get(command, COMMANDS.get(command.partition(" ")[0], ""))
    return owner in parts() or owner not in PARTS


def call(*args: str, code: int | tuple[int, ...] = 0) -> Result:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code in ((code,) if isinstance(code, int) else code), result.output
    return result


def document(*args: str) -> Any:
    return json.loads(call(*args, "--json").stdout)


def refused(*args: str) -> WorkbenchError:
    result = CliRunner().invoke(app, list(args))
    assert isinstance(result.exception, WorkbenchError), result.output
    return result.exception


def run(*args: str, code: int | tuple[int, ...] = 0) -> Result:
    result = CliRunner().invoke(app, list(args))
    found = result.exception.exit_code if isinstance(result.exception, WorkbenchError) else result.exit_code
    assert found in ((code,) if isinstance(code, int) else code), result.output + str(result.exception)
    return result

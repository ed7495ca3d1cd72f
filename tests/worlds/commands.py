"""The command line in this process: what it prints, the document of `--json`, the error that it raises."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from workbench.cli.app import app
from workbench.ground.errors import WorkbenchError


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

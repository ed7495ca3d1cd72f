"""The option --trust-project-code of commands that read recipes or tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

TrustOpt = Annotated[
    bool,
    typer.Option(
        "--trust-project-code",
        help="Run the project's own Python code (methods/, evals/) with your rights. See `workbench trust`.",
    ),
]


def reads_recipes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that reads recipes or tasks the option --trust-project-code."""

    @wraps(command)
    def wrapped(*args: Any, trust_project_code: bool = False, **options: Any) -> Any:
        from workbench.ground.trust import trusting

        with trusting(trust_project_code):
            return command(*args, **options)

    signature = inspect.signature(command, eval_str=True)  # typer evaluates no annotations of a given signature
    option = inspect.Parameter("trust_project_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=TrustOpt)
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {
        name: parameter.annotation for name, parameter in [*signature.parameters.items(), (option.name, option)]
    }
    return wrapped

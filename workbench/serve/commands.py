"""Command `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from workbench.console.options import DeviceOpt, RunsOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import UsageError, shell

_HERE = ("127.0.0.1", "localhost", "::1")


@reads_recipes
def serve(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Recipe, run, configuration directory or model.", show_default=False)
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port; 0: a free one.")] = 8000,
    key: Annotated[
        str | None,
        typer.Option("--key", envvar="WORKBENCH_SERVE_KEY", help="Secret that requests must send: `Authorization: Bearer KEY`."),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="URL", help="Server of the configuration's adapters, which writes the texts.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Longest time for a request.")] = 600.0,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
) -> None:
    """Serve a configuration to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    Waiting requests are batched. A routed configuration chooses a brick for each request and names it in the response header X-Brick. A
    request may name a brick, or base, as its model. With --to, requests go on to vLLM, SGLang or llama-server, each with the adapter that
    the router chooses. The server runs until Ctrl-C, and first finishes the texts that it has begun.
    """
    from workbench.api.naming import open_named
    from workbench.models.identity import pick_device
    from workbench.run.materialize import materialize
    from workbench.serve.app import application
    from workbench.serve.server import before, listening, run, served

    if host not in _HERE and not key:
        raise UsageError(
            f"--host {host}: everyone who reaches this machine could use the model",
            f"Set a key: {shell('workbench', 'serve', target, '--host', host)} --key SECRET",
        )
    named = open_named(target, out.event, runs_dir)
    with listening(host, port) as opened:
        model = materialize(named.resolved, pick_device(device), events=out.event)
        it = served(named, model, key, seconds) if to is None else None
        app = application(it) if it else before(named, model, to or "", key, seconds)
        opened.listen(128)
        address = f"http://{f'[{host}]' if ':' in host else host}:{opened.getsockname()[1]}/v1"
        out.line(address)
        out.say(f"serving {named.name}; Ctrl-C ends the server")
        run(app, opened, it.engine if it else None, out.say)

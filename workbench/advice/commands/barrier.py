"""Command `brick barrier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes


@reads_recipes
def barrier(
    first: Annotated[str, typer.Argument(help="Checkpoint; with --base, any brick.", show_default=False)],
    second: Annotated[
        str, typer.Argument(help="Checkpoint of the same shapes, or an adapter or recipe on the first one.", show_default=False)
    ],
    text: Annotated[
        Path, typer.Option("--text", help="Held-out texts: jsonl of {text} or {prompt, completion}.", show_default=False)
    ],
    base: Annotated[str | None, typer.Option("--base", help="Model that both are bricks of.")] = None,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure the loss along the line between two models, and say whether merging them linearly has a chance.

    The barrier is the largest rise of the loss above the straight line between the losses of the two ends.
    """
    from workbench.advice.barrier import measure_barrier
    from workbench.models.identity import pick_device

    out.quiet = quiet or json
    measured = measure_barrier(first, second, text, project=Path.cwd(), device=pick_device(device), base=base, events=out.event)

    def table() -> None:
        rows = [[f"{p.t:.1f}", f"{p.loss:.4f}", f"[{p.low:.4f}, {p.high:.4f}]", f"{p.above:+.4f}"] for p in measured.points]
        out.table(["t", "loss", "95 %", "above the line"], rows)
        height = measured.barrier
        out.line(
            f"barrier {height.value:.4f} nats [{height.low:.4f}, {height.high:.4f}] at t = {height.t:.1f}; "
            f"{measured.items} texts, {measured.tokens:,} tokens"
        )
        out.line(measured.says)

    out.result(lambda: measured, table, json=json)

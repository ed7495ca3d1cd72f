"""Command `edit trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.api.naming import open_named
from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.numbers import fixed

if TYPE_CHECKING:
    from workbench.neurons.trace import RecoveredShare, TraceTable


@reads_recipes
def trace(
    model: Annotated[
        str,
        typer.Argument(
            help="Recipe (its result is traced), model directory or hub id.", metavar="RECIPE_OR_MODEL", show_default=False
        ),
    ],
    facts: Annotated[Path, typer.Argument(help="JSONL or YAML file of facts with subjects.", show_default=False)],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Trace only the first N facts.")] = 20,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers to restore: a list 0,4,8 or a slice 4:20; default: all.")
    ] = None,
    html: Annotated[Path | None, typer.Option("-o", "--html", help="HTML file to write, with heat maps.")] = None,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Trace facts through the layers of a model.

    Restores one layer's states at a time, and measures how much of the answer's probability returns (causal tracing, Meng et
    al. 2022). Prints a table. It is for reading only: `layers: auto` of an edit step tries edits on several layers instead.
    """
    from workbench.models.identity import pick_device
    from workbench.neurons.trace import trace_table

    out.quiet = json or quiet
    table = trace_table(
        open_named(model, out.event), facts, str(facts), count=count, layers=layers, device=pick_device(device), events=out.event
    )
    out.result(lambda: table, lambda: _say_trace(table), json=json)
    if html:
        from workbench.neurons.pages.tracemap import render_trace

        out.say(str(render_trace(table, html)))


def _say_trace(table: TraceTable) -> None:
    from workbench.console.grid import Look, grid
    from workbench.neurons.trace import OUTPUTS, WORDS
    from workbench.report.tints import SCALES, inside

    out.line(
        f"{table.model}: {table.facts} facts of {table.file}; probability of the model's own answer {table.clean:.3f}, "
        f"{table.corrupted:.3f} with another subject"
    )
    look = Look(SCALES["recovered"], _percent, "the 95 % interval over facts includes 0")
    for what, title in OUTPUTS.items():
        out.line("")
        cells: dict[int | None, dict[str, RecoveredShare]] = {
            layer: {place: table.share(what, layer, place) for place in WORDS} for layer in table.layers
        }
        grid(
            f"recovered by restoring {title}, %",
            WORDS,
            cells,
            lambda cell, _: cell.recovered,
            look,
            lambda cell, _: inside(0.0, cell.interval),
        )


def _percent(share: float) -> str:
    return fixed(100 * share, 1, minus="-")

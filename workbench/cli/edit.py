"""Commands `edit rebase|trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import open_named
from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.trust import reads_recipes
from workbench.ground.errors import shell

if TYPE_CHECKING:
    from workbench.neurons.trace import RecoveredShare, TraceTable
    from workbench.resolve.resolved import Resolved
    from workbench.upkeep.rebase import Rebased

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Solve edits again on other weights, and trace facts.")
SHOWN = 10


@app.command()
@reads_recipes
def rebase(
    brick: Annotated[
        str, typer.Argument(help="Edit brick: a directory, its name in bricks/, or edits/STEP of a run.", show_default=False)
    ],
    onto: Annotated[
        str,
        typer.Option(
            "--onto",
            metavar="RECIPE_OR_MODEL",
            help="Recipe (its result is used), or model directory, to solve it on.",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="New directory for the new brick.", show_default=False)],
    remeasure: Annotated[
        bool,
        typer.Option(
            "--remeasure",
            help="Choose layers and positions that the step leaves to `auto` again, instead of keeping the brick's.",
        ),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the brick's step. Repeatable."),
    ] = None,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Solve an edit again on another model.

    Takes the facts and settings that the edit was made with.
    """
    from workbench.models.identity import pick_device
    from workbench.upkeep.rebase import rebase as run

    out.quiet = json or quiet
    model = open_named(onto, out.event)
    folder = Path(brick) if Path(brick).is_dir() or not Path("bricks", brick).is_dir() else Path("bricks", brick)
    rebased = run(
        folder,
        model,
        to,
        device=pick_device(device),
        remeasure=remeasure,
        settings=settings or (),
        events=out.event,
    )

    def text() -> None:
        for line in (rebased.brick, *_said(rebased)):
            out.line(line)
        _say_use(rebased, onto, model.resolved)

    out.result(lambda: rebased, text, json=json)


@app.command()
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
    from workbench.cli._heat import grid
    from workbench.neurons.trace import OUTPUTS, WORDS
    from workbench.report.tints import inside

    out.line(
        f"{table.model}: {table.facts} facts of {table.file}; probability of the model's own answer {table.clean:.3f}, "
        f"{table.corrupted:.3f} with another subject"
    )
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
            "recovered",
            lambda cell, _: inside(0.0, cell.interval),
        )


def _said(rebased: Rebased) -> list[str]:
    """Return the lines that describe a rebased edit."""
    said = rebased.said
    old = (
        "the old brick does not fit" if said.before is None else f"{100 * said.before:.1f} % with the old brick added as a delta"
    )
    lines = [
        f"{rebased.facts} facts, {rebased.method}, solved on {rebased.onto} ({rebased.solved_on[:12]})"
        + "".join(f", {key} {_text(value)} as before" for key, value in rebased.kept.items()),
        f"facts answered (greedy, whole target): {100 * said.without:.1f} % without the edit, {old}, {100 * said.after:.1f} % rebased",
    ]
    if lost := rebased.not_said:
        lines.append(f"not answered: {', '.join(lost[:SHOWN])}" + (f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""))
    return lines


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _say_use(rebased: Rebased, onto: str, resolved: Resolved) -> None:
    """Print the recipe lines that add the brick at the place where it is exact."""
    name = Path(rebased.brick).name
    where = f"as a last step of {onto}" if resolved.recipe.steps else f"first in a recipe with base: {onto}"
    out.say(f"use:    bricks: {{{name}: {rebased.brick}}} and, {where}, {{merge: task_arithmetic, bricks: {{{name}: 1.0}}}}")
    if rebased.unlisted:
        out.say(
            f"        also list the bricks of step {', '.join(rebased.unlisted)}, which takes all bricks of the recipe if it lists none"
        )
    out.say(f"show:   workbench brick show {shell(rebased.brick)}")

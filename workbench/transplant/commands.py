"""Command `brick transplant`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.api.bricks import brick_directory
from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt
from workbench.console.output import out
from workbench.ground.errors import shell

if TYPE_CHECKING:
    from workbench.transplant.transplant import Transplant


def transplant(
    brick: Annotated[str, typer.Argument(help="Adapter: a directory, or its name in bricks/.", show_default=False)],
    target: Annotated[
        str, typer.Option("--to", metavar="MODEL", help="Model to carry it to: a directory or hub id.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="New directory for the adapter.", show_default=False)],
    on: Annotated[
        str | None, typer.Option("--on", metavar="MODEL", help="Model that it was trained on; default: the one that it names.")
    ] = None,
    by: Annotated[
        Literal["copy", "assign", "ridge"] | None,
        typer.Option(
            "--by",
            help="How units are matched: copy (as they are), assign (one to one, on texts), ridge (linear maps, on texts). Default: copy if all shapes are equal, else ridge.",
        ),
    ] = None,
    mapping: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="TARGET:SOURCE,...",
            help="Layers by hand: 0:0,1:2,2:4. Default: equal layers, or evenly spaced ones.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            "--texts", help="Texts to match and measure on: jsonl of {text} or {prompt, completion}.", show_default=False
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write the adapter even at chance level, from another base, or without what has no counterpart."
        ),
    ] = False,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Carry a LoRA adapter to another model, and report what was carried and how well the models match.

    The target may have another depth, other widths, another tokenizer, or be a new release of the same base. With texts, the command
    measures how well the units of both models match and the loss before and after; it refuses to write at chance level.
    """
    from workbench.models.identity import pick_device
    from workbench.transplant.inputs import Wanted
    from workbench.transplant.transplant import transplant as run

    out.quiet = quiet or json
    wanted = Wanted(brick_directory(brick), target, on, by, mapping, texts, force)
    report = run(wanted, to, project=Path.cwd(), device=pick_device(device), events=out.event)
    out.result(lambda: report, lambda: _print(report), json=json, warnings=report.notes)


def _print(report: Transplant) -> None:
    """Print the layers, the match, the losses and what was not carried."""
    from workbench.run.loading import adapter_hints

    out.table(
        ["layer", "takes", "modules", "matched", "under 0.2"],
        [
            [
                str(row.layer),
                "+".join(map(str, row.sources)),
                str(len(row.modules)),
                "" if row.matched is None else f"{row.matched:.3f}",
                "" if row.under is None else f"{100 * row.under:.0f} %",
            ]
            for row in report.layers
        ],
        right=(0, 1, 2, 3, 4),
    )
    for reason, count in Counter(row.reason for row in report.not_carried).items():
        first = next(row.tensor for row in report.not_carried if row.reason == reason)
        out.line(f"not carried: {first.removesuffix('.weight')}{f' and {count - 1} more' if count > 1 else ''}: {reason}")
    if (match := report.match) and (places := report.positions):
        out.line(
            f"matched correlation {match.matched:.3f}, {match.chance:.3f} with exchanged tokens (chance), on "
            f"{len(match.layers)} layers; {places.common:,} common positions, {100 * places.share:.0f} % of the shorter reading"
        )
    else:
        out.line("no texts: neither the match nor the loss was measured")
    if loss := report.loss:
        out.line(
            f"loss on {loss.texts} held-out texts, nats per token: {loss.before:.3f} before, {loss.after:.3f} after; "
            f"on its own base {loss.source:.3f} before, {loss.source_with_brick:.3f} with the brick"
        )
    out.line(f"{report.adapter}: {report.modules} modules, rank {report.rank}, by {report.by}")
    for line in (
        *adapter_hints(report.to, report.adapter, report.to),
        f"show:   workbench brick show {shell(report.adapter)}",
    ):
        out.say(line)

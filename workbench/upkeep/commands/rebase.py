"""Command `edit rebase`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import open_named
from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import shell

if TYPE_CHECKING:
    from workbench.resolve.resolved import Resolved
    from workbench.upkeep.rebase import Rebased


SHOWN = 10


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

"""Commands `route explain|check|measure|ls|add|rm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import configuration_named
from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt, RunsOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import UsageError, WorkbenchError, shell

if TYPE_CHECKING:
    from workbench.route.deciding.checking import RouteCheck
    from workbench.route.mixing.explain import Explanation
    from workbench.route.mixing.live import Routing
    from workbench.run.routers import RouterChange

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show and check which bricks a routed configuration chooses.")
TargetArg = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="Routed configuration directory, run, or recipe with a route step.", show_default=False
    ),
]
DirArg = Annotated[
    str, typer.Argument(metavar="DIR", help="Routed configuration directory, or a run or recipe with one.", show_default=False)
]
_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green", "bright_yellow")


@app.command()
@reads_recipes
def explain(
    target: TargetArg,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A prompt; `-` reads it from stdin.", show_default=False)],
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with the tokens in colors.")] = None,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Show which bricks a prompt gets, and why: scores, confidence and threshold, and the choice at each token."""
    from workbench.route.mixing.explain import explain as explained

    out.quiet = json or quiet
    prompt = typer.get_text_stream("stdin").read().rstrip("\n") if text == "-" else text
    routing, model, tokenizer = _open(target, runs_dir, device)
    found = explained(routing, model, tokenizer, prompt)
    if html is not None:
        from workbench.ground.files import write_text
        from workbench.report.routing import explain_page

        write_text(html, explain_page(found, routing.bricks))
    out.result(lambda: found, lambda: _say_explained(found, routing.bricks), json=json)
    if html is not None:
        out.say(f"written: {html}")


def _say_roles(found: Explanation) -> None:
    text = " + ".join(f"{weight:g} {name}" for name, weight in found.chosen.items())
    out.line(f"{found.method}: {text or 'base'} on text")
    spans: list[list[str]] = []
    for token in found.tokens:
        role = token.role or "text"
        if not spans or spans[-1][0] != role:
            spans.append([role, "0", ""])
        spans[-1] = [role, str(int(spans[-1][1]) + 1), spans[-1][2] + token.token]
    out.table(["role", "tokens", "text"], spans, right=(1,))


def _say_explained(found: Explanation, bricks: Sequence[str]) -> None:
    if found.by_role:
        _say_roles(found)
        return
    chosen = ", ".join(name if weight == 1 else f"{name} {weight:.2f}" for name, weight in found.chosen.items())
    out.line(f"{found.method}: {chosen or 'base'}")
    limit = "no threshold" if found.threshold is None else f"threshold {found.threshold:.4g}"
    out.line(f"confidence {found.confidence:.4g}, {limit}{'' if found.chosen else ': below it, the base answers alone'}")
    tied = {name: group for group in found.ties for name in group}
    rows = [
        [name, f"{score:.4f}", f"tied: {', '.join(tied[name])}" if name in tied else ""]
        for name, score in sorted(found.scores.items(), key=lambda item: -item[1])
    ]
    out.table(["brick", "score", ""], rows, right=(1,))
    if found.tokens:
        colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(bricks)}
        out.colored([(token.token, colors.get(token.chosen or "", "")) for token in found.tokens])
        used = dict.fromkeys(token.chosen for token in found.tokens)
        out.colored([(f"{name or 'base'}  ", colors.get(name or "", "")) for name in used])


@app.command()
@reads_recipes
def check(
    target: TargetArg,
    prompts: Annotated[
        list[Path],
        typer.Option(
            "--prompts",
            help='JSONL file of {"prompt":, "brick":}, with null for prompts that no brick is for. Repeat for several sets.',
            show_default=False,
        ),
    ],
    copies: Annotated[
        bool,
        typer.Option(
            "--copies/--no-copies",
            help="Also check each set as users vary it: lower case, greetings, typos, thanks behind, a paragraph before.",
        ),
    ] = True,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Check a router on prompts whose bricks are known: right, wrong and to the base, and who is confused with whom."""
    from workbench.route.deciding.checking import check_sets, read_asked

    out.quiet = json or quiet
    if len(set(prompts)) < len(prompts):
        raise UsageError("--prompts: a file is named twice", "Name each file once.")
    for path in prompts:
        read_asked(path, str(path))  # errors in a file, before a router is fitted
    routing, _, tokenizer = _open(target, runs_dir, device)
    sets = {str(path): read_asked(path, str(path), routing.bricks) for path in prompts}
    found = check_sets(routing, tokenizer, sets, copies)
    out.result(lambda: found, lambda: _say_checked(found), json=json)


_SHARES = {
    "right": "right",
    "right_score": "right score",
    "to_base": "to base",
    "wrong_brick": "wrong brick",
    "kept_by_base": "no brick, kept by base",
}


def _say_checked(found: RouteCheck) -> None:
    shares = [{key: getattr(row, key) for key in _SHARES if getattr(row, key) is not None} for row in found.sets]
    keys = [key for key in _SHARES if any(key in row for row in shares)]
    rows = [
        [checked.set, str(checked.prompts), *(f"{100 * row[key]:.1f} %" if key in row else "" for key in keys)]
        for checked, row in zip(found.sets, shares, strict=True)
    ]
    out.table(["set", "prompts", *(_SHARES[key] for key in keys)], rows, right=range(1, len(keys) + 2))
    for name, table in found.confusion.items():
        columns = [c for c in [*found.bricks, "base"] if any(c in row for row in table.values())]
        out.line("")
        out.line(f"{name}: rows are for, columns went to")
        out.table(
            ["", *columns],
            [[w, *(str(row.get(c, "")) for c in columns)] for w, row in table.items()],
            right=range(1, len(columns) + 1),
        )
    if found.curve:
        out.line("")
        out.line("what other thresholds cost: `threshold:` in the route step sets one")
        points = [[f"{p.threshold:.4g}", f"{100 * p.to_base:.1f} %", f"{100 * p.routed:.1f} %"] for p in found.curve]
        out.table(["threshold", "falsely to base", "falsely routed"], points, right=range(3))
    for group in found.ties:
        out.say(f"tied:   {', '.join(group)} have the same kind of prompts; {group[0]} acts, and they count as one here")


@app.command()
def measure(
    bricks: Annotated[
        list[str],
        typer.Argument(
            metavar="BRICK...", help="Bricks with a brick.yaml: directories, or names in bricks/.", show_default=False
        ),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", help='JSONL file of {"prompt":} or {"text":}; default: the rows that the brick was trained on.'
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=4, help="Largest number of prompts, with every frequent wording of the file.")
    ] = 64,
    base: Annotated[str | None, typer.Option("--base", help="Base model; default: the one that the card names.")] = None,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure a brick's prompts on its base, and keep the statistics beside its card.

    Routers that are fitted later take them instead of running the base again. `brick train` measures them by itself.
    """
    from workbench.api.bricks import brick_directory
    from workbench.models.identity import pick_device
    from workbench.run.route_statistics import MeasuredBrick, measure_brick, measuring

    out.quiet = json or quiet
    if calibration is not None and len(bricks) > 1:
        raise UsageError(f"--calibration holds the prompts of one brick, found {len(bricks)} bricks", "Measure them one by one.")
    folders = [brick_directory(name) for name in bricks]
    chosen = [measuring(folder, calibration, samples) for folder in folders]
    rows = []
    for folder, what in zip(folders, chosen, strict=True):
        found = measure_brick(folder, what, base, pick_device(device), out.event)
        rows.append(MeasuredBrick(brick=folder.resolve().name, **found.model_dump()))

    def text() -> None:
        for row, folder in zip(rows, folders, strict=True):
            out.line(f"{row.brick}: {row.prompts} prompts of {row.source}, layer {row.layer}, last {row.window} tokens")
            out.say(f"written: {folder / row.file}")

    out.result(lambda: rows, text, json=json)


@app.command("ls")
@reads_recipes
def list_(place: DirArg, runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """List the bricks of a router: prompts, right share on held-out templates, ties, and what was added and removed."""
    from workbench.run.rerouting import listed

    found = listed(configuration_named(place, runs_dir))

    def text() -> None:
        def share(value: float | None) -> str:
            return "" if value is None else f"{100 * value:.1f} %"

        rows = [
            [row.name, str(row.prompts), share(row.right), ", ".join(row.tied), row.description or ""] for row in found.bricks
        ]
        out.table(["brick", "prompts", "right", "tied with", ""], rows, right=(1, 2))
        out.line(f"{found.method}, {'no threshold' if found.threshold is None else f'threshold {found.threshold:.4g}'}")
        for change in found.changes:
            out.line(f"{change.time}  {'added' if change.action == 'add' else 'removed'} {change.brick}")

    out.result(lambda: found, text, json=json)


@app.command()
@reads_recipes
def add(
    place: DirArg,
    brick: Annotated[
        str,
        typer.Argument(metavar="[NAME=]BRICK", help="Directory of a LoRA brick, or its name in bricks/.", show_default=False),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", help='JSONL file of {"prompt":} or {"text":}; default: the rows that the brick was trained on.'
        ),
    ] = None,
    description: Annotated[str | None, typer.Option("--description", help="A line that says what the brick does.")] = None,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Add a brick to a router, in place: threshold and ties are those of a fit with it from the start.

    The base is not run if the brick's card has statistics of the same prompts: `brick train` and `route measure` write them.
    """
    from workbench.api.bricks import find_brick
    from workbench.models.identity import pick_device
    from workbench.run.rerouting import NewBrick, add_brick
    from workbench.run.route_statistics import Measuring, measuring

    out.quiet = json or quiet
    name, named, reference = brick.rpartition("=")
    found = find_brick(reference)
    new = replace(found, name=name) if named else found
    texts = Measuring(calibration, str(calibration)) if calibration else measuring(found.path)
    what = NewBrick(new, texts, description)
    change = add_brick(configuration_named(place, runs_dir), what, pick_device(device), out.event)
    out.result(lambda: change, lambda: _say_change(change), json=json)


@app.command()
@reads_recipes
def rm(
    place: DirArg,
    brick: Annotated[str, typer.Argument(metavar="NAME", help="Name of the brick in the router.", show_default=False)],
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Remove a brick from a router, in place, with its adapter: the router is that of a fit without it."""
    from workbench.run.rerouting import remove_brick

    out.quiet = json or quiet
    change = remove_brick(configuration_named(place, runs_dir), brick, out.event)
    out.result(lambda: change, lambda: _say_change(change), json=json)


def _say_change(change: RouterChange) -> None:
    limit = "no threshold" if change.threshold is None else f"threshold {change.threshold:.4g}"
    out.line(f"{change.brick} {'added' if change.action == 'add' else 'removed'}, {limit}")


def _open(target: str, runs_dir: Path | None, device: str) -> tuple[Routing, Any, Any]:
    """Load a routed model with its tokenizer."""
    from workbench.api.chatting import open_speakers
    from workbench.models.identity import pick_device

    (speaker,) = open_speakers([target], runs_dir, pick_device(device), plain=True, say=out.say, events=out.event)
    model = speaker.model()
    routing = getattr(model, "routing", None)
    if routing is None:
        raise WorkbenchError(
            f"{target}: has no router, so there is no choice to show",
            f"Run a recipe that ends in a route step: {shell('workbench', 'methods', 'ridge')} describes one.",
        )
    return routing, model, speaker.tokenizer

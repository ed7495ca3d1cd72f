"""Commands `route explain|check|measure`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt, RunsOpt
from workbench.cli._output import out
from workbench.cli._trust import reads_recipes
from workbench.errors import UsageError, WorkbenchError, shell

if TYPE_CHECKING:
    from workbench.route.mixing.live import Routing

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show and check which bricks a routed configuration chooses.")
TargetArg = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="Routed configuration directory, run, or recipe with a route step.", show_default=False
    ),
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
    from workbench.cli.documents.routing import ExplainDocument
    from workbench.library.route import explain as explained

    out.quiet = json or quiet
    prompt = typer.get_text_stream("stdin").read().rstrip("\n") if text == "-" else text
    routing, model, tokenizer = _open(target, runs_dir, device)
    document = explained(routing, model, tokenizer, prompt)
    if html is not None:
        from workbench.report.routing import explain_page

        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(explain_page(document, routing.bricks), "utf-8")
    out.result(
        lambda: ExplainDocument.model_validate(document), lambda: _say_explained(document, list(routing.bricks)), json=json
    )
    if html is not None:
        out.say(f"written: {html}")


def _say_roles(document: dict[str, Any]) -> None:
    text = " + ".join(f"{weight:g} {name}" for name, weight in document["chosen"].items())
    out.line(f"{document['method']}: {text or 'base'} on text")
    spans: list[list[str]] = []
    for token in document["tokens"]:
        role = token["role"] or "text"
        if not spans or spans[-1][0] != role:
            spans.append([role, "0", ""])
        spans[-1] = [role, str(int(spans[-1][1]) + 1), spans[-1][2] + token["token"]]
    out.table(["role", "tokens", "text"], spans, right=(1,))


def _say_explained(document: dict[str, Any], bricks: list[str]) -> None:
    if any("role" in token for token in document["tokens"]):
        _say_roles(document)
        return
    chosen = ", ".join(name if weight == 1 else f"{name} {weight:.2f}" for name, weight in document["chosen"].items())
    out.line(f"{document['method']}: {chosen or 'base'}")
    threshold = document["threshold"]
    limit = "no threshold" if threshold is None else f"threshold {threshold:.4g}"
    out.line(f"confidence {document['confidence']:.4g}, {limit}{'' if chosen else ': below it, the base answers alone'}")
    ranked = sorted(document["scores"].items(), key=lambda item: -item[1])
    tied = {name: group for group in document["ties"] for name in group}
    rows = [[name, f"{score:.4f}", f"tied: {', '.join(tied[name])}" if name in tied else ""] for name, score in ranked]
    out.table(["brick", "score", ""], rows, right=(1,))
    if document["tokens"]:
        colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(bricks)}
        out.colored([(token["token"], colors.get(token["chosen"] or "", "")) for token in document["tokens"]])
        used = dict.fromkeys(token["chosen"] for token in document["tokens"])
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
    from workbench.cli.documents.routing import RouteCheckDocument
    from workbench.library.route import check_sets, read_asked

    out.quiet = json or quiet
    if len(set(prompts)) < len(prompts):
        raise UsageError("--prompts: a file is named twice", "Name each file once.")
    for path in prompts:
        read_asked(path, str(path))  # errors in a file, before a router is fitted
    routing, _, tokenizer = _open(target, runs_dir, device)
    sets = {str(path): read_asked(path, str(path), routing.bricks) for path in prompts}
    document = check_sets(routing, tokenizer, sets, copies)
    out.result(lambda: RouteCheckDocument.model_validate(document), lambda: _say_checked(document), json=json)


def _say_checked(document: dict[str, Any]) -> None:
    def share(row: dict[str, Any], key: str) -> str:
        return f"{100 * row[key]:.1f} %" if key in row else ""

    known = ("right", "right_score", "to_base", "wrong_brick", "kept_by_base")
    keys = [key for key in known if any(key in row for row in document["sets"])]
    heads = {
        "right_score": "right score",
        "to_base": "to base",
        "wrong_brick": "wrong brick",
        "kept_by_base": "no brick, kept by base",
    }
    rows = [[row["set"], str(row["prompts"]), *(share(row, key) for key in keys)] for row in document["sets"]]
    out.table(["set", "prompts", *(heads.get(key, key) for key in keys)], rows, right=range(1, len(keys) + 2))
    for name, table in document["confusion"].items():
        columns = [c for c in [*document["bricks"], "base"] if any(c in row for row in table.values())]
        out.line("")
        out.line(f"{name}: rows are for, columns went to")
        out.table(
            ["", *columns],
            [[w, *(str(row.get(c, "")) for c in columns)] for w, row in table.items()],
            right=range(1, len(columns) + 1),
        )
    if document["curve"]:
        out.line("")
        out.line("what other thresholds cost: `threshold:` in the route step sets one")
        points = [
            [f"{p['threshold']:.4g}", *(f"{100 * p[key]:.1f} %" for key in ("to_base", "routed"))] for p in document["curve"]
        ]
        out.table(["threshold", "falsely to base", "falsely routed"], points, right=range(3))
    for group in document["ties"]:
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
    from workbench.cli._bricks import brick_directory
    from workbench.cli.documents.routing import MeasuredBrick
    from workbench.library.route_statistics import measure_brick, measuring
    from workbench.models.device import pick_device

    out.quiet = json or quiet
    if calibration is not None and len(bricks) > 1:
        raise UsageError(f"--calibration holds the prompts of one brick, found {len(bricks)} bricks", "Measure them one by one.")
    folders = [brick_directory(name) for name in bricks]
    chosen = [measuring(folder, calibration, samples) for folder in folders]
    rows = []
    for folder, what in zip(folders, chosen, strict=True):
        found = measure_brick(folder, what, base, pick_device(device), out.event)
        rows.append({"brick": folder.resolve().name, **found.model_dump(mode="json")})

    def text() -> None:
        for row, folder in zip(rows, folders, strict=True):
            out.line(
                f"{row['brick']}: {row['prompts']} prompts of {row['source']}, layer {row['layer']}, last {row['window']} tokens"
            )
            out.say(f"written: {folder / row['file']}")

    out.result(lambda: [MeasuredBrick.model_validate(row) for row in rows], text, json=json)


def _open(target: str, runs_dir: Path | None, device: str) -> tuple[Routing, Any, Any]:
    """Load a routed model with its tokenizer.

    Raises:
        WorkbenchError: If the target has no router.
    """
    from workbench.cli.chat import open_live
    from workbench.models.device import pick_device

    model, tokenizer = open_live(target, runs_dir, pick_device(device))
    routing = getattr(model, "routing", None)
    if routing is None:
        raise WorkbenchError(
            f"{target}: has no router, so there is no choice to show",
            f"Run a recipe that ends in a route step: {shell('workbench', 'methods', 'ridge')} describes one.",
        )
    return routing, model, tokenizer

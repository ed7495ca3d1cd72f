"""Command `analyze decompose`: sparsity, coupling and redundancy of bricks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.analyses.shared import ModelArg, OutOpt, finish, labelled_texts, results_folder


def decompose(
    model: ModelArg,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="JSONL file of labelled texts whose function is the name of a brick, or a function on its card; "
            "without it, only weights are compared.",
            show_default=False,
        ),
    ] = None,
    to: OutOpt = None,
    keep: Annotated[float, typer.Option("--keep", min=0.01, max=1, help="Share of the score to keep.")] = 0.9,
    items: Annotated[int, typer.Option("--items", min=1, help="Held-out texts of each task whose loss is measured.")] = 10,
    scored: Annotated[
        Literal["whole", "response"] | None,
        typer.Option(
            "--scored",
            help="Tokens whose loss counts: of the `whole` text or the `response`; default: responses, if all texts have one.",
        ),
    ] = None,
    output: Annotated[
        Literal["hidden", "update"],
        typer.Option("--output", help="Outputs compared in function space: `hidden` states, or the `update` of each layer."),
    ] = "update",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens on which they are compared.")] = 512,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure how sparse, coupled and redundant bricks are: those of a recipe, and the model's own sets of neurons.

    Leaves each brick of the recipe out once, keeps the most important ones, and compares bricks in weight and in function space. The
    numbers of neurons are those of `analyze ablate` and `analyze sparsity` in the same directory.
    """
    from workbench.api.naming import open_named
    from workbench.cli.documents.decompose import DecompositionDocument
    from workbench.library.neurons_decompose import DecomposeOptions, analyze_decomposition
    from workbench.models.identity import pick_device

    out.quiet = json or quiet
    texts = (labelled_texts(data), str(data)) if data else None
    opened = open_named(model, out.event)
    place = results_folder(to, opened.name)
    options = DecomposeOptions(kept=keep, items=items, tokens=tokens, output=output, scored=scored)
    analysis = analyze_decomposition(opened, texts, place, options, device=pick_device(device), events=out.event)
    for warning in analysis.warnings:
        out.warn(warning)
    analysis.write(place)
    finish(analysis.document(), place, json, say_decomposition, DecompositionDocument)


def say_decomposition(document: dict[str, Any]) -> None:
    """Print the metrics of each decomposition, and the cosines of the bricks."""
    kept = 100 * document["settings"]["kept"]
    for part in document["decompositions"]:
        low, high = part["interval"]
        ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
        coupling = "undefined" if part["coupling"] is None else f"{part['coupling']:.2f}{ends}"
        out.line(f"{part['origin']}: {part['parts']:,} {part['unit']}, coupling {coupling}")
        rows = [[row["function"], *_cells(row["coupling"], row["curve"])] for row in part["functions"]]
        rows.append(["all", *_cells(part["coupling"], part["curve"])])
        out.table(["function", "coupling", f"least share for {kept:g} %", "area"], rows, right=(1, 2, 3))
        for note in part["notes"]:
            out.line(note)
        out.line("")
    if cosines := document["cosines"]:
        function = cosines["function"]
        columns = ["bricks", "weight cosine", *(["function cosine"] if function else [])]
        names = cosines["names"]
        rows = [
            [f"{a}, {b}", _number(cosines["weight"][i][j]), *([_number(function["mean"][i][j])] if function else [])]
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i < j
        ]
        out.table(columns, rows, right=(1, 2))
        if not function:
            out.say("function space needs texts: --data FILE")


def _cells(coupling: float | None, curve: dict[str, Any] | None) -> list[str]:
    least, area = (curve["least_share"], curve["area"]) if curve else (None, None)
    return [_number(coupling), "–" if least is None else f"{100 * least:.0f} %", _number(area)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"

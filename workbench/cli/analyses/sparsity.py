"""Command `analyze sparsity`: how many neurons a token uses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.analyses.shared import DataOpt, ModelArg, OutOpt, finish, labelled_texts, numbers, open_subject, results_folder


def sparsity(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    percents: Annotated[
        str,
        typer.Option("--mask", metavar="PERCENTS", help="Shares of the neurons of every token and layer to mask, in percent."),
    ] = "0,30,50,60,70,80,90",
    items: Annotated[int, typer.Option("--items", min=1, help="Held-out texts of each task whose loss is measured.")] = 5,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens in the sample of activations.")] = 256,
    normalizer: Annotated[
        Literal["token_max", "layer_max", "neuron_max"],
        typer.Option("--normalizer", help="Maximum that an activation is divided by: over its token, its layer, or its neuron."),
    ] = "token_max",
    scored: Annotated[
        Literal["whole", "response"],
        typer.Option("--scored", help="Tokens whose loss counts: of the `whole` text or the `response`."),
    ] = "whole",
    cett: Annotated[float, typer.Option("--cett", min=0, max=1, help="Truncation error that no layer may exceed.")] = 0.2,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sample.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure how many neurons a token uses, and what masking the least active ones costs.

    Compares two indicators: the activation, and the norm of what a neuron adds to the output.
    """
    from workbench.cli.documents.analyze import SparsityDocument
    from workbench.library.neurons_sparsity import SparsityOptions, analyze_sparsity

    out.quiet = json or quiet
    options = SparsityOptions(
        percents=numbers("--mask", percents),
        items=items,
        tokens=tokens,
        normalizer=normalizer,
        scored=scored,
        cett=cett,
        seed=seed,
    )
    texts = labelled_texts(data)
    subject = open_subject(model, device)
    analysis = analyze_sparsity(subject, texts, str(data), options)
    place = results_folder(to, subject.name)
    analysis.write(place)
    finish(analysis.document(), place, json, say_sparsity, SparsityDocument)


def say_sparsity(document: dict[str, Any]) -> None:
    """Print the rise of the loss by share of masked neurons."""
    for d in document["distributions"]:
        out.line(
            f"{d['indicator']}: {100 * d['mean_small']:.0f} % of the neurons of a token below 0.2 of its largest ({d['tokens']} tokens)"
        )
    percents = [point["percent"] for point in document["curves"][0]["points"]]
    columns = ["rise of the loss, nats", "function", *(f"{percent:g} %" for percent in percents), "free up to"]
    rows = [
        [
            curve["indicator"],
            curve["function"] or "all",
            *(f"{point['rise']:.3f}" for point in curve["points"]),
            f"{curve['free']:g} %",
        ]
        for curve in document["curves"]
    ]
    out.table(columns, rows, right=range(2, len(columns)))
    cett = document["cett"]
    if cett["mean_sparsity"] is not None:
        out.line(
            f"truncation error {cett['target']:g} in every layer: {100 * cett['mean_sparsity']:.0f} % of the neurons are not needed"
        )

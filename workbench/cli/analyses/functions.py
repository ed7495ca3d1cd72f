"""Command `analyze functions`: scores of every neuron for every function."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.analyses.shared import (
    DataOpt,
    ModelArg,
    OutOpt,
    finish,
    labelled_texts,
    results_folder,
)


def functions(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    share: Annotated[float, typer.Option("--share", min=0.0001, max=1, help="Share of the neurons in a function's set.")] = 0.05,
    per: Annotated[
        Literal["layer", "model"], typer.Option("--per", help="Take the share of every `layer`, or of the whole `model`.")
    ] = "layer",
    score: Annotated[
        Literal["mean_abs", "max_relu"],
        typer.Option(
            "--score", help="Score of a text: `mean_abs`, the mean of |activation|, or `max_relu`, the largest activation."
        ),
    ] = "mean_abs",
    part: Annotated[
        Literal["prompt", "whole"],
        typer.Option("--part", help="Tokens that count: those of the `prompt`, or of the `whole` text."),
    ] = "prompt",
    skip: Annotated[
        int, typer.Option("--skip", min=0, help="Tokens at the start of a text that do not count: they attract attention.")
    ] = 1,
    no_residents: Annotated[
        bool, typer.Option("--no-residents", help="Leave neurons that are very active on every function out of the sets.")
    ] = False,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside", help="Also analyze the base and each brick alone: which sets survive a merge. One more pass each."
        ),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the test's draws, and of the control's label.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Score every neuron for every function (FuncScore), and test which neurons serve one.

    Sets are chosen on some tasks of a function and judged on others; the test takes all tasks. Writes scores, tables and one set of neurons per
    function.
    """
    from workbench.api.naming import open_named
    from workbench.cli.documents.analyze import FunctionsDocument
    from workbench.emergent.activations import PassOptions
    from workbench.emergent.functions import Settings
    from workbench.library.neurons_beside import check_beside, functions_beside
    from workbench.library.neurons_functions import analyze_functions
    from workbench.library.neurons_subject import open_neurons
    from workbench.models.identity import pick_device

    out.quiet = json or quiet
    texts = labelled_texts(data)
    opened = open_named(model, out.event)
    if beside:
        check_beside(opened)
    subject = open_neurons(opened, pick_device(device), out.event)
    settings = Settings(share=share, per=per, keep_residents=not no_residents, seed=seed)
    options = PassOptions(score=score, part=part, skip=skip, chat=chat)
    analysis = analyze_functions(subject, texts, str(data), settings=settings, options=options)
    place = results_folder(to, subject.name)
    analysis.write(place)
    document = analysis.document()
    if beside:
        del subject
        compared = functions_beside(
            opened, analysis, settings=settings, options=options, device=pick_device(device), events=out.event
        )
        compared.write(place)
        document["beside"] = compared.document()
    finish(document, place, json, say_functions, FunctionsDocument)


def say_functions(document: dict[str, Any]) -> None:
    """Print the scores of each function beside chance."""
    from workbench.report.neurons_functions import function_cells

    count = sum(document["neurons"].values())
    out.line(
        f"{document['model']}: {count} {document['unit']} in {len(document['neurons'])} layers, {document['data']['items']} texts, "
        f"{document['data']['tokens']} tokens"
    )
    test = document["test"]
    out.line(
        f"found: {100 * (1 - test['alpha']):g} % of such analyses find no neuron for a function that it does not serve (test over "
        f"{test['tasks']} tasks). Effects are in standard deviations over tasks."
    )
    columns = ["function", "best/layer", "top 5‰", "mean", "chance", "found", "largest effect", "findable from"]
    columns += ["overlap", "others", "length AUC"]
    rows = [function_cells(row)[: len(columns)] for row in document["functions"]]
    out.table(columns, rows, right=range(1, len(columns)))
    if beside := document.get("beside"):
        _say_beside(beside)


def _say_beside(document: dict[str, Any]) -> None:
    """Print how many neurons of each model's sets the merge's sets have, and their held-out scores."""
    names = [model["name"] for model in document["models"][:-1]]
    out.line("")
    out.line(
        f"neurons of each model's set that are in the merge's set too (by chance {document['settings']['share']:.2f}), and held-out score of "
        "the set in its own model → in the merge"
    )
    rows = [
        [
            row["function"],
            *(f"{m['in_merge']:.2f}  {m['score']:.2f} → {m['score_in_merge']:.2f}" for m in row["models"][:-1]),
            f"{row['models'][-1]['score']:.2f}",
        ]
        for row in document["functions"]
    ]
    out.table(["function", *names, "the merge's own"], rows, right=range(1, len(names) + 2))

"""Commands `analyze functions|…`: where a model's abilities sit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from workbench.cli._analyses import finish, labelled_texts, numbers, open_subject, results_folder, say, write_page
from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.trust import reads_recipes

ModelArg = Annotated[
    str,
    typer.Argument(
        help="Recipe (its result is analyzed), model directory or hub id.", metavar="RECIPE_OR_MODEL", show_default=False
    ),
]
DataOpt = Annotated[
    Path,
    typer.Option(
        "--data",
        help='JSONL file of labelled texts: {"prompt":, "function":}, and optionally "response", "task", "split".',
        show_default=False,
    ),
]
OutOpt = Annotated[
    Path | None, typer.Option("-o", "--out", help="Directory of the results; default: runs/neurons/MODEL.", show_default=False)
]
ItemsOpt = Annotated[int, typer.Option("--items", min=1, help="Held-out texts of each task whose loss is measured.")]
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Find the neurons that serve a function, prove it by switching them off, and save them as bricks.",
)


@app.command("functions")
@reads_recipes
def functions(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    share: Annotated[float, typer.Option("--share", min=0.0001, max=1, help="Share of every layer in a function's set.")] = 0.05,
    part: Annotated[
        Literal["prompt", "whole"],
        typer.Option("--part", help="Tokens that count: those of the `prompt`, or of the `whole` text."),
    ] = "prompt",
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the test's draws.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Score every neuron for every function (FuncScore), and test which neurons serve one.

    Sets are chosen on some tasks of a function and judged on others; the test takes all tasks. Writes scores, tables and one set of neurons per
    function.
    """
    from workbench.neurons.functions import FunctionSettings, analyze_functions

    out.quiet = json or quiet
    texts = labelled_texts(data)
    analysis = analyze_functions(
        open_subject(model, device), texts, FunctionSettings(share=share, part=part, chat=chat, seed=seed)
    )
    place = results_folder(to, analysis.result.model)
    analysis.write(place)
    finish(analysis.result, place, json)


@app.command("sparsity")
@reads_recipes
def sparsity(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    percents: Annotated[
        str,
        typer.Option("--mask", metavar="PERCENTS", help="Shares of the neurons of every token and layer to mask, in percent."),
    ] = "0,30,50,60,70,80,90",
    items: ItemsOpt = 5,
    scored: Annotated[
        Literal["whole", "response"],
        typer.Option("--scored", help="Tokens whose loss counts: of the `whole` text or the `response`."),
    ] = "whole",
    cett: Annotated[float, typer.Option("--cett", min=0, max=1, help="Truncation error that no layer may exceed.")] = 0.2,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure how many neurons a token uses, and what masking the least active ones costs.

    Compares two indicators: the activation, and the norm of what a neuron adds to the output.
    """
    from workbench.neurons.masking import SparsitySettings, analyze_sparsity

    out.quiet = json or quiet
    settings = SparsitySettings(percents=numbers("--mask", percents), items=items, scored=scored, cett=cett)
    texts = labelled_texts(data)
    result = analyze_sparsity(open_subject(model, device), texts, settings)
    place = results_folder(to, result.model)
    result.save(place)
    finish(result, place, json)


@app.command("ablate")
@reads_recipes
def ablate(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    items: ItemsOpt = 10,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random sets, and sets matched by activation.")] = 1,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Switch off each function's neurons, and measure what every function loses on texts that did not choose them.

    Takes the sets that `analyze functions` has written, and compares them with sets of equal size: random, and random with the same mean
    activation.
    """
    from workbench.neurons.ablation import AblationSettings, analyze_ablation, read_sets

    out.quiet = json or quiet
    texts = labelled_texts(data)
    subject = open_subject(model, device)
    place = results_folder(to, subject.name)
    result = analyze_ablation(subject, texts, read_sets(place, subject), AblationSettings(items=items, draws=draws))
    result.save(place)
    finish(result, place, json)


@app.command("partition")
@reads_recipes
def partition(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    method: Annotated[
        Literal["random", "kmeans", "coactivation", "cmoe"],
        typer.Option(
            "--method",
            help="How neurons are divided: at `random`; `kmeans`, by their gate's weights; `coactivation`, by the tokens on which they are "
            "active; or as CMoE does (`cmoe`).",
        ),
    ] = "kmeans",
    experts: Annotated[int, typer.Option("--experts", min=2, help="Experts of a layer, shared ones included.")] = 16,
    shared: Annotated[
        int | None,
        typer.Option("--shared", min=0, help="Experts that serve every token; default: the method's choice.", show_default=False),
    ] = None,
    used: Annotated[
        str, typer.Option("--used", metavar="PERCENTS", help="Shares of the experts that serve a token, in percent.")
    ] = "75,50,25",
    items: ItemsOpt = 2,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens in the sample that divides the neurons and fits the selectors.")
    ] = 2048,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the samples and of the partition.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Divide the neurons of every layer into experts of equal size, and measure the loss when a token uses some of them.

    Prints, for each way of choosing a token's experts, how much the loss rises, and how far all experts together are from the dense layer.
    Writes the partition, which `grow: split_ffn` turns into a mixture of experts.
    """
    from workbench.neurons.partition import PartitionSettings, analyze_partition

    out.quiet = json or quiet
    settings = PartitionSettings(
        method=method, experts=experts, shared=shared, used=numbers("--used", used), items=items, tokens=tokens, seed=seed
    )
    settings.counts()  # finds bad shares before the model is loaded
    texts = labelled_texts(data)
    analysis = analyze_partition(open_subject(model, device), texts, settings)
    place = results_folder(to, analysis.result.model)
    analysis.write(place)
    finish(analysis.result, place, json)


@app.command("locate")
@reads_recipes
def locate(
    model: ModelArg,
    facts: Annotated[Path, typer.Option("--facts", help="JSONL or YAML file of facts.", show_default=False)],
    to: OutOpt = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Locate only the first N facts.")] = 10,
    answer: Annotated[
        Literal["own", "target", "target_true"],
        typer.Option(
            "--answer", help="Answer to attribute: the model's `own` next token, the fact's `target`, or its `target_true`."
        ),
    ] = "own",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the integral.")] = 20,
    threshold: Annotated[
        float,
        typer.Option("--threshold", min=0, max=1, help="A wording keeps neurons above this share of its largest attribution."),
    ] = 0.2,
    share: Annotated[
        float, typer.Option("--share", min=0.0001, max=1, help="Share of a fact's wordings that must keep a neuron.")
    ] = 0.7,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random sets that each fact's neurons are compared with.")] = 3,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Find the neurons that carry facts, and prove it by suppressing and amplifying them.

    Attributes the answer's probability to neurons by integrated gradients (Dai et al. 2022). Compares them with random neurons of the
    same layers and with `edit trace`. Writes one set of neurons per fact, and one of all facts.
    """
    from workbench.api.naming import open_named
    from workbench.models.identity import pick_device
    from workbench.neurons.fact_neurons import LocateSettings
    from workbench.neurons.locate import analyze_facts

    out.quiet = json or quiet
    settings = LocateSettings(answer=answer, steps=steps, threshold=threshold, share=share, draws=draws, count=count)
    opened = open_named(model, out.event)
    report = analyze_facts(opened, facts, str(facts), settings, device=pick_device(device), events=out.event)
    for warning in report.result.data.warnings:
        out.warn(warning)
    place = results_folder(to, report.result.model)
    report.write(place)
    finish(report.result, place, json)


@app.command("all")
@reads_recipes
def everything(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Run `functions`, `sparsity` and `ablate` with their defaults, and write one page."""
    from workbench.neurons.ablation import analyze_everything

    out.quiet = json or quiet
    texts = labelled_texts(data)
    subject = open_subject(model, device)
    place = results_folder(to, subject.name)
    result = analyze_everything(subject, texts, place)
    page = write_page(place, result.functions)

    def text() -> None:
        for part in (result.functions, result.sparsity, result.ablation):
            say(part)
            out.line("")

    out.result(lambda: result, text, json=json)
    out.say(f"written: {page}")

"""Commands `analyze functions|…`: where a model's abilities sit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli._trust import reads_recipes

if TYPE_CHECKING:
    from workbench.cli.documents.document import Document
    from workbench.emergent.labelled import Labelled
    from workbench.library.neurons_subject import NeuronSubject

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Find the neurons that serve a function, prove it by switching them off, and save them as bricks.",
)

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


@app.command()
@reads_recipes
def functions(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    share: Annotated[float, typer.Option("--share", min=0.0001, max=1, help="Share of the neurons in a function's set.")] = 0.05,
    per: Annotated[
        Literal["layer", "model"], typer.Option("--per", help="Take the share of every `layer`, or of the whole `model`.")
    ] = "layer",
    polarity: Annotated[
        Literal["one", "both"],
        typer.Option("--polarity", help="`one`: neurons that are more active on the function; `both`: also less active ones."),
    ] = "one",
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
    draws: Annotated[int, typer.Option("--draws", min=1, help="Shuffled labelings per null.")] = 20,
    no_residents: Annotated[
        bool, typer.Option("--no-residents", help="Leave neurons that are very active on every function out of the sets.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the shuffles.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Score every neuron for every function (FuncScore), beside labels shuffled over items and over tasks.

    Neurons are chosen on some tasks of a function and judged on others. Writes scores, tables and one set of neurons per function.
    """
    from workbench.cli.documents.analyze import FunctionsDocument
    from workbench.emergent.functions import Settings
    from workbench.library.neurons_functions import PassOptions, analyze_functions

    out.quiet = json or quiet
    texts = _texts(data)
    subject = _subject(model, device)
    settings = Settings(
        share=share,
        per=per,
        polarity=polarity,
        draws=draws,
        keep_residents=not no_residents,
        seed=seed,
    )
    options = PassOptions(score=score, part=part, skip=skip, chat=chat)
    analysis = analyze_functions(subject, texts, str(data), settings=settings, options=options)
    place = _place(to, subject)
    analysis.write(place)
    _finish(analysis.document(), place, json, _say_functions, FunctionsDocument)


@app.command()
@reads_recipes
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
        percents=_numbers("--mask", percents),
        items=items,
        tokens=tokens,
        normalizer=normalizer,
        scored=scored,
        cett=cett,
        seed=seed,
    )
    texts = _texts(data)
    subject = _subject(model, device)
    analysis = analyze_sparsity(subject, texts, str(data), options)
    place = _place(to, subject)
    analysis.write(place)
    _finish(analysis.document(), place, json, _say_sparsity, SparsityDocument)


@app.command()
@reads_recipes
def ablate(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    items: Annotated[int, typer.Option("--items", min=1, help="Held-out texts of each task whose perplexity is measured.")] = 10,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random sets, and sets matched by activation.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Switch off each function's neurons, and measure what every function loses on texts that did not choose them.

    Takes the sets that `analyze functions` has written, and compares them with sets of equal size: random, random with the same mean
    activation, and chosen by a shuffled label.
    """
    from workbench.cli.documents.analyze import AblationDocument
    from workbench.library.neurons_ablate import AblationOptions, analyze_ablation, read_sets

    out.quiet = json or quiet
    texts = _texts(data)
    subject = _subject(model, device)
    place = _place(to, subject)
    analysis = analyze_ablation(
        subject, texts, str(data), read_sets(place, subject), AblationOptions(items=items, draws=draws, seed=seed)
    )
    analysis.write(place)
    _finish(analysis.document(), place, json, _say_ablation, AblationDocument)


@app.command()
def transplant(
    base: Annotated[str, typer.Argument(help="Base: model directory or hub id.", show_default=False)],
    brick: Annotated[str, typer.Argument(help="Brick: a directory, or its name in bricks/.", show_default=False)],
    texts: Annotated[
        str,
        typer.Option(
            "--texts", help='JSONL file of texts of the skill: {"text":} or {"prompt":, "completion":}.', show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="New directory for the set.", show_default=False)],
    share: Annotated[float, typer.Option("--share", min=0.0001, max=1, help="Share of the neurons of every layer.")] = 0.2,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of texts to read, evenly spaced in the file.")] = 64,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Choose the neurons where a brick's delta acts, so that a merge can move it on these neurons alone.

    A neuron's score is the norm of the delta in its rows and column, times its mean activation on the texts.
    """
    from workbench.cli._bricks import brick_directory
    from workbench.cli.documents.analyze import TransplantDocument
    from workbench.library.neurons import transplant_set
    from workbench.models.device import pick_device

    out.quiet = json or quiet
    place = str(brick_directory(brick))
    chosen = transplant_set(
        base, place, texts, share, project=Path.cwd(), device=pick_device(device), out=to, samples=samples, events=out.event
    )

    def text() -> None:
        neurons = chosen.neurons
        moved = neurons.evidence["delta_share"]
        out.line(
            f"{to}: {neurons.size:,} {neurons.kind} ({100 * neurons.share:.3g} %), {100 * moved:.3g} % of the delta's square"
        )
        out.say(f"use:    where: {{neurons: {to}}} in a merge step with {place}")

    out.result(lambda: TransplantDocument.model_validate(chosen.document()), text, json=json)


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
    from workbench.cli.documents.analyze import EverythingDocument
    from workbench.library.neurons_ablate import analyze_ablation, read_sets
    from workbench.library.neurons_functions import analyze_functions
    from workbench.library.neurons_sparsity import analyze_sparsity

    out.quiet = json or quiet
    texts = _texts(data)
    subject = _subject(model, device)
    place = _place(to, subject)
    functions = analyze_functions(subject, texts, str(data))
    functions.write(place)
    sparsity = analyze_sparsity(subject, texts, str(data))
    sparsity.write(place)
    ablation = analyze_ablation(subject, texts, str(data), read_sets(place, subject))
    ablation.write(place)
    documents = {"functions": functions.document(), "sparsity": sparsity.document(), "ablation": ablation.document()}
    page = _page(place, documents["functions"])

    def text() -> None:
        for say, document in zip((_say_functions, _say_sparsity, _say_ablation), documents.values(), strict=True):
            say(document)
            out.line("")

    out.result(lambda: EverythingDocument.model_validate(documents), text, json=json)
    out.say(f"written: {page}")


def _place(to: Path | None, subject: NeuronSubject) -> Path:
    return to or Path("runs", "neurons", subject.name)


def _finish(
    document: dict[str, Any], place: Path, json: bool, say: Callable[[dict[str, Any]], None], cls: type[Document]
) -> None:
    """Print a document or its table, and write the page of all analyses in the directory."""
    page = _page(place, document)
    out.result(lambda: cls.model_validate(document), lambda: say(document), json=json)
    out.say(f"written: {page}")


def _page(place: Path, document: dict[str, Any]) -> Path:
    """Write the page of all analyses of the same model in a directory."""
    from workbench.files import read_json
    from workbench.report.neurons import SECTIONS, render_neurons

    stored = {kind: read_json(place / f"{kind}.json", digest=str) for kind in SECTIONS}
    known = {kind: other for kind, other in stored.items() if other is not None and other["digest"] == document["digest"]}
    return render_neurons(known, place / "index.html")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from workbench.errors import UsageError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers separated by commas, such as 0,50,80") from None


def _texts(data: Path) -> Labelled:
    """Read the labelled texts and print what they cannot show."""
    from workbench.emergent.labelled import read_labelled

    texts = read_labelled(data, str(data))
    for warning in texts.warnings:
        out.warn(warning)
    if texts.several:
        out.say(f"{texts.several} rows with several functions are left out")
    return texts


def _subject(model: str, device: str) -> NeuronSubject:
    from workbench.cli._subjects import open_configuration
    from workbench.library.neurons_subject import open_neurons
    from workbench.models.device import pick_device

    name, resolved, _ = open_configuration(model)
    return open_neurons(resolved, name, pick_device(device), out.event)


def _say_functions(document: dict[str, Any]) -> None:
    count = sum(document["neurons"].values())
    nulls = document["nulls"]["train"]
    out.line(
        f"{document['model']}: {count} {document['unit']} in {len(document['neurons'])} layers, {document['data']['items']} texts, "
        f"{document['data']['tokens']} tokens"
    )
    limits = ", ".join(
        f"{limit['layer']:.3f} with labels shuffled over {null}s ({100 * (1 - limit['level']):.3g} %)"
        for null, limit in nulls.items()
    )
    out.line(f"best neuron of a layer by chance: {limits}")
    columns = ["function", "best/layer", "top 5‰", "mean", "chance", *(f"beyond {null} null" for null in nulls)]
    columns += ["on both splits", "overlap", "others", "length AUC"]
    rows: list[list[str]] = []
    for row in document["functions"]:
        rows.append(
            [
                row["function"],
                f"{row['best_median']:.2f} / {row['best_max']:.2f}",
                f"{row['top']:.2f}",
                f"{row['mean']:.3f}",
                f"{row['prevalence']:.3f}",
                *(str(row["beyond"][null]["train"]) for null in nulls),
                str(row["beyond"][list(nulls)[-1]]["both"]),
                f"{row['overlap']:.2f}",
                f"{row['overlap_others']:.2f}",
                f"{row['confounders']['length']:.2f}",
            ]
        )
    out.table(columns, rows, right=range(1, len(columns)))


def _say_sparsity(document: dict[str, Any]) -> None:
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


def _say_ablation(document: dict[str, Any]) -> None:
    out.line(
        f"change of perplexity, %, with {100 * document['share']:g} % of the neurons switched off ({document['items']} texts)"
    )
    names = document["functions"]
    rows = [[name, *(f"{100 * v:.0f}" for v in row)] for name, row in zip(names, document["changes"], strict=True)]
    for kind, control in document["controls"].items():
        changes = control["changes"]
        is_shared = all(row == changes[0] for row in changes)  # one set is the control of all functions
        labels = [kind] if is_shared else [f"{kind}: {name}" for name in names]
        rows += [[label, *(f"{100 * v:.0f}" for v in row)] for label, row in zip(labels, changes, strict=False)]
    out.table(["switched off", *names], rows, right=range(1, len(names) + 1))
    for kind, table in {"sets": document, **document["controls"]}.items():
        low, high = table["interval"]
        ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
        coupling = "undefined" if table["coupling"] is None else f"{table['coupling']:.2f}{ends}"
        out.line(f"{kind}: own function harmed most in {table['dominant_rows']} of {len(names)} rows, coupling {coupling}")

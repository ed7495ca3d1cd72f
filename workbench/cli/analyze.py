"""Commands `analyze functions|…`: where a model's abilities sit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli._trust import reads_recipes

if TYPE_CHECKING:
    from workbench.emergent.labelled import Labelled
    from workbench.library.neurons_functions import FunctionAnalysis
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
        str, typer.Option("--part", help="Tokens that count: those of the `prompt`, or of the `whole` text.")
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
    place = to or Path("runs", "neurons", subject.name)
    analysis.write(place)
    if json:
        out.json(analysis.document())
        return
    _say_functions(analysis)
    out.say(f"written: {place}")


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
    from workbench.cli.edit import _configuration
    from workbench.library.neurons_subject import open_neurons
    from workbench.models.device import pick_device

    name, resolved, _ = _configuration(model)
    return open_neurons(resolved, name, pick_device(device), out.event)


def _say_functions(analysis: FunctionAnalysis) -> None:
    document = analysis.document()
    count = sum(document["neurons"].values())
    nulls = document["nulls"]["train"]
    out.line(
        f"{document['model']}: {count} {document['unit']} in {len(document['neurons'])} layers, {document['data']['items']} texts, "
        f"{document['data']['tokens']} tokens"
    )
    limits = ", ".join(f"{limit['layer']:.3f} with labels shuffled over {null}s" for null, limit in nulls.items())
    out.line(f"best neuron of a layer by chance (99 %): {limits}")
    columns = [
        "function",
        "best/layer",
        "top 5‰",
        "mean",
        "chance",
        *(f"beyond {n} null" for n in nulls),
        "on both splits",
        "overlap",
        "others",
        "length AUC",
    ]
    rows: list[list[str]] = []
    for row in document["functions"]:
        last = list(nulls)[-1]
        rows.append(
            [
                row["function"],
                f"{row['best_median']:.2f} / {row['best_max']:.2f}",
                f"{row['top']:.2f}",
                f"{row['mean']:.3f}",
                f"{row['prevalence']:.3f}",
                *(str(row["beyond"][null]["train"]) for null in nulls),
                str(row["beyond"][last]["both"]),
                f"{row['overlap']:.2f}",
                f"{row['overlap_others']:.2f}",
                f"{row['confounders']['length']:.2f}",
            ]
        )
    out.table(columns, rows, right=range(1, len(columns)))

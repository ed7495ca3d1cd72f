"""Command `analyze partition`: feed-forward neurons as experts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.analyses.shared import DataOpt, ModelArg, OutOpt, finish, labelled_texts, numbers, open_subject, results_folder


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
    selectors: Annotated[
        str, typer.Option("--selectors", metavar="NAMES", help="Selectors to measure, separated by commas.")
    ] = "oracle,centroid,representative,ridge,mlp",
    items: Annotated[int, typer.Option("--items", min=1, help="Held-out texts of each task whose loss is measured.")] = 2,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens in the sample that divides the neurons and fits the selectors.")
    ] = 2048,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the samples and of the partition.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Divide the neurons of every layer into experts of equal size, and measure the loss when a token uses some of them.

    Checks that all experts together are the dense layer. Compares selectors of experts with the oracle. Writes the partition, which
    `grow: split_ffn` turns into a mixture of experts.
    """
    from workbench.cli.documents.partition import PartitionDocument
    from workbench.library.neurons_partition import PartitionOptions, analyze_partition

    out.quiet = json or quiet
    options = PartitionOptions(
        method=method,
        experts=experts,
        shared=shared,
        used=numbers("--used", used),
        selectors=_names(selectors),
        items=items,
        tokens=tokens,
        seed=seed,
    )
    options.counts()  # finds bad shares before the model is loaded
    texts = labelled_texts(data)
    subject = open_subject(model, device)
    analysis = analyze_partition(subject, texts, str(data), options)
    place = results_folder(to, subject.name)
    analysis.write(place)
    finish(analysis.document(), place, json, say_partition, PartitionDocument)


def _names(text: str) -> Any:
    """Return the selectors of a list.

    Raises:
        WorkbenchError: If one does not exist.
    """
    from workbench.emergent.selectors import SelectorName
    from workbench.errors import UsageError, nearest

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    known = get_args(SelectorName)
    if not names or (unknown := [name for name in names if name not in known]):
        found = f"'{unknown[0]}'" if names else "none"
        raise UsageError(
            f"--selectors {text}: expected some of {', '.join(known)}; found {found}",
            nearest(unknown[0], known) if names else None,
        )
    return names


def say_partition(document: dict[str, Any]) -> None:
    """Print the partition, and the losses by selector and share of experts."""
    sizes, shared = sorted(set(document["sizes"].values())), sorted(set(document["shared"].values()))
    out.line(
        f"{document['model']}: {document['experts']} experts of {_range(sizes)} neurons in each of {len(document['sizes'])} layers, "
        f"{_range(shared)} of them shared"
    )
    out.line(f"all experts together differ from the dense layers by {document['difference']:.1g} of their largest output")
    points = document["curves"][0]["points"]
    columns = ["selector", *(f"{p['used']:g} % used: mass, rise of the loss in nats" for p in points)]
    rows = [
        [curve["selector"], *(f"{100 * p['captured']:.0f} %  {p['rise']:.3f}" for p in curve["points"])]
        for curve in document["curves"]
    ]
    out.table(columns, rows, right=range(1, len(columns)))


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"

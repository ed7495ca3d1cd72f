"""Command `analyze ablate`: what every function loses when the neurons of one are switched off."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.analyses.shared import DataOpt, ModelArg, OutOpt, finish, labelled_texts, numbers, open_subject, results_folder
from workbench.errors import UsageError


def ablate(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    items: Annotated[int, typer.Option("--items", min=1, help="Held-out texts of each task whose perplexity is measured.")] = 10,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random sets, and sets matched by activation.")] = 1,
    between: Annotated[
        str | None,
        typer.Option(
            "--between",
            metavar="LOW,HIGH",
            help="Also switch neurons off only while their activation lies in this range: standard deviations around its mean on the "
            "function's own texts, such as -2.5,2.5.",
        ),
    ] = None,
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
    ends = numbers("--between", between) if between else None
    if ends is not None and (len(ends) != 2 or not ends[0] < ends[1]):
        raise UsageError(f"--between {between}: expected a low and a high end, such as -2.5,2.5")
    texts = labelled_texts(data)
    subject = open_subject(model, device)
    place = results_folder(to, subject.name)
    analysis = analyze_ablation(
        subject,
        texts,
        str(data),
        read_sets(place, subject),
        AblationOptions(items=items, draws=draws, seed=seed, between=(ends[0], ends[1]) if ends else None),
    )
    analysis.write(place)
    finish(analysis.document(), place, json, say_ablation, AblationDocument)


def say_ablation(document: dict[str, Any]) -> None:
    """Print the damage matrix, its controls and their coupling."""
    out.line(
        f"change of perplexity, %, with {100 * document['share']:g} % of the neurons switched off ({document['items']} texts)"
    )
    names = document["functions"]
    rows = [[name, *(_percent(v) for v in row)] for name, row in zip(names, document["changes"], strict=True)]
    if within := document.get("between"):
        rows += [[f"within: {name}", *(_percent(v) for v in row)] for name, row in zip(names, within["changes"], strict=True)]
    for kind, control in document["controls"].items():
        changes = control["changes"]
        is_shared = all(row == changes[0] for row in changes)  # one set is the control of all functions
        labels = [kind] if is_shared else [f"{kind}: {name}" for name in names]
        rows += [[label, *(_percent(v) for v in row)] for label, row in zip(labels, changes, strict=False)]
    out.table(["switched off", *names], rows, right=range(1, len(names) + 1))
    ranged = {"sets within the range": within} if within else {}
    for kind, table in {"sets": document, **ranged, **document["controls"]}.items():
        low, high = table["interval"]
        ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
        coupling = "undefined" if table["coupling"] is None else f"{table['coupling']:.2f}{ends}"
        out.line(f"{kind}: own function harmed most in {table['dominant_rows']} of {len(names)} rows, coupling {coupling}")


def _percent(change: float | None) -> str:
    text = "inf" if change is None else f"{100 * change:.0f}"
    return "0" if text == "-0" else text

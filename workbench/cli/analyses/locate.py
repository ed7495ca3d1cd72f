"""Command `analyze locate`: the neurons that carry facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.analyses.shared import ModelArg, OutOpt, finish, results_folder

SHOWN = 40
"""Largest number of characters of a prompt in the table."""


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
    at: Annotated[
        Literal["last", "all"],
        typer.Option("--at", help="Tokens whose activations count: the `last` token of the prompt, or `all` of its tokens."),
    ] = "last",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the integral.")] = 20,
    threshold: Annotated[
        float,
        typer.Option("--threshold", min=0, max=1, help="A wording keeps neurons above this share of its largest attribution."),
    ] = 0.2,
    share: Annotated[
        float, typer.Option("--share", min=0.0001, max=1, help="Share of a fact's wordings that must keep a neuron.")
    ] = 0.7,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random sets that each fact's neurons are compared with.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random sets.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Find the neurons that carry facts, and prove it by suppressing and amplifying them.

    Attributes the answer's probability to neurons by integrated gradients (Dai et al. 2022). Compares them with random neurons of the
    same layers and with `edit trace`. Writes one set of neurons per fact, and one of all facts.
    """
    from workbench.api.naming import open_named
    from workbench.cli.documents.locate import KnowledgeDocument
    from workbench.emergent.knowledge import LocateSettings
    from workbench.library.neurons_facts import knowledge_report
    from workbench.models.identity import pick_device

    out.quiet = json or quiet
    settings = LocateSettings(
        answer=answer, steps=steps, at=at, threshold=threshold, share=share, draws=draws, seed=seed, count=count
    )
    opened = open_named(model, out.event)
    report = knowledge_report(opened, facts, str(facts), settings, device=pick_device(device), events=out.event)
    for warning in report.warnings:
        out.warn(warning)
    place = results_folder(to, report.model)
    report.write(place)
    finish(report.document(), place, json, say_knowledge, KnowledgeDocument)


def say_knowledge(document: dict[str, Any]) -> None:
    """Print the facts, the changes of probability beside random neurons, and the agreement with a trace."""
    count = len(document["facts"])
    out.line(
        f"{document['model']}: {document['neurons']} {document['unit']} carry {count} facts of {document['data']['file']}; attributions "
        f"add up for {document['complete']} of {count}"
    )
    columns = ["prompt", "answer", "P", document["unit"], "suppressed", "random", "amplified", "random", "sum error"]
    rows = [
        [
            fact["prompt"] if len(fact["prompt"]) <= SHOWN else f"…{fact['prompt'][1 - SHOWN :]}",
            fact["answer"].strip(),
            f"{fact['probability']:.3f}",
            str(len(fact["neurons"])),
            *(_change(fact["changes"].get(kind), side) for kind in ("suppressed", "amplified") for side in ("own", "random")),
            f"{fact['error']:.2g}",
        ]
        for fact in document["facts"]
    ]
    out.table(columns, rows, right=range(2, len(columns)))
    for kind, change in document["changes"].items():
        ends = "" if change["low"] is None else f" [{_signed(change['low'])}, {_signed(change['high'])}]"
        others = "" if change["others"] is None else f", answers of other facts {_signed(change['others'])} %"
        out.line(
            f"{kind}: answer {_signed(change['own'])} %, with random neurons {_signed(change['random'])} %, difference "
            f"{_signed(change['difference'])}{ends} points{others}"
        )
    agreement = document["agreement"]["last"]
    if document["note"]:
        out.line(document["note"])
    elif agreement is not None:
        out.line(f"rank correlation over layers with `edit trace` at the last token: {agreement:+.2f}")


def _change(change: dict[str, Any] | None, side: str) -> str:
    return "" if change is None else f"{_signed(change[side], 0)} %"


def _signed(share: float, decimals: int = 1) -> str:
    """Return a share in percent with its sign; a value that rounds to zero has none."""
    text = f"{100 * share:+.{decimals}f}"
    return text if float(text) else text[1:]

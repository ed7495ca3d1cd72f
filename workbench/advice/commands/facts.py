"""Command `facts check`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.console.options import DeviceOpt, FactsArg, JsonOpt, QuietOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import GateFailedError, UsageError

if TYPE_CHECKING:
    from workbench.advice.facts import FactFinding
    from workbench.recipe.recipe import Recipe
    from workbench.run.opened import NamedModel

EncoderOpt = Annotated[
    Path | None,
    typer.Option(
        "--encoder",
        metavar="DIRECTORY",
        help="Sentence encoder: also report facts that probably answer one question in two wordings. Default: the encoder of "
        "the recipe's `edit: memory`.",
    ),
]
ContinuesOpt = Annotated[
    str | None,
    typer.Option(
        "--continues",
        metavar="RUN",
        help="With --stream: directory of the run, or of its edit, whose stream the file continues.",
        show_default=False,
    ),
]
SHOWN = 10


@reads_recipes
def check(
    file: FactsArg,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Recipe: also search its edit bricks and edit steps for these facts, and ask its base for its answers.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="RECIPE_OR_MODEL",
            help="Recipe (its result is used), model directory or hub id to ask instead of the base.",
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Read the file in order, as sequential edits do: later rows update or remove earlier facts."
        ),
    ] = False,
    encoder: EncoderOpt = None,
    continues: ContinuesOpt = None,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Check facts for contradictions, duplicates and known answers.

    Also finds facts that other bricks of a recipe teach, and targets that a model already answers. Exits with 3 if a fact fails.
    """
    from workbench.advice.fact_wordings import compare_wordings, require_encoder
    from workbench.advice.facts import check_facts
    from workbench.api.naming import load_named
    from workbench.edit.closed_form.continuing import read_earlier
    from workbench.models.identity import pick_device

    out.quiet = json or quiet
    if continues and not stream:
        raise UsageError("--continues: only a stream continues a run", "Add --stream.")
    loaded = load_named(recipe) if recipe else None
    asked_model = _model(model, loaded)
    used_encoder = encoder or _encoder_of(loaded)
    if used_encoder is not None:
        require_encoder(used_encoder)
    in_order = read_earlier(continues, Path()).start() if continues else stream
    report = check_facts(
        file,
        str(file),
        stream=in_order,
        recipe=loaded,
        model=asked_model,
        device=pick_device(device),
        events=out.event,
    )
    if used_encoder is not None:
        report = compare_wordings(report, file, used_encoder, stream=in_order)

    def text() -> None:
        if report.findings:
            _table(report.findings)
        counts = ", ".join(f"{count} {kind}" for kind, count in report.counts.items()) or "nothing found"
        looked = "" if asked_model else "; answers were not compared with a model's (--model, --recipe)"
        looked += "" if used_encoder else "; wordings were compared by form and relation alone (--encoder)"
        kind = "" if report.format == "facts" else f" ({report.format})"
        with_run = f", those of {continues} included" if continues else ""
        out.say(f"{file}: {report.facts} facts{kind}{with_run}: {counts}{looked}")

    out.result(lambda: report, text, json=json)
    if report.failed:
        first, more = report.failed[0], f" (and {len(report.failed) - 1} more)" if len(report.failed) > 1 else ""
        raise GateFailedError(f"{first.place}: {first.kind}: {first.found}{more}", first.repair)


def _encoder_of(recipe: Recipe | None) -> Path | None:
    """Return the directory of the sentence encoder that a step of a recipe uses, if one does."""
    names = [name for step in (recipe.steps if recipe else ()) if (name := getattr(step, "encoder", None))]
    return recipe.project / names[0] if recipe and names else None


def _table(findings: list[FactFinding]) -> None:
    """Print all failures, and the first warnings of each kind."""
    rows, warnings = [], Counter[str]()
    for finding in findings:
        warnings[finding.kind] += finding.status == "warning"
        if finding.status == "failed" or warnings[finding.kind] <= SHOWN:
            mark = "FAILED" if finding.status == "failed" else "warning"
            rows.append([finding.place, finding.kind, mark, finding.found, finding.repair])
    out.table(["place", "kind", "", "found", "repair"], rows)
    if more := [f"{count - SHOWN} {kind}" for kind, count in warnings.items() if count > SHOWN]:
        out.say(f"warnings not shown: {', '.join(more)}; --json lists all")


def _model(reference: str | None, recipe: Recipe | None) -> NamedModel | None:
    """Return the model to ask: the one of --model, else the recipe's base."""
    from workbench.api.naming import open_named
    from workbench.bricks.hub import Hub
    from workbench.resolve.resolve import resolve
    from workbench.run.opened import NamedModel

    if reference is not None:
        return open_named(reference, out.event, project=recipe.project if recipe else None)
    return NamedModel("the base", resolve(recipe.derive("base", []), Hub(events=out.event))) if recipe else None

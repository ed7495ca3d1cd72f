"""Command `analyze transplant`: the neurons where a brick acts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out


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
    share: Annotated[
        float,
        typer.Option("--share", min=0.0001, max=1, help="Share of the neurons: of every layer, or with --trained of the model."),
    ] = 0.2,
    trained: Annotated[bool, typer.Option("--trained", help="Train one gate per neuron on the texts to choose.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps, with --trained; 60 if not given.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of texts to read, evenly spaced in the file.")] = 64,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Choose the neurons where a brick's delta acts, so that a merge can move it on these neurons alone.

    A neuron's score is the norm of the delta in its rows and column, times its mean activation on the texts. With
    --trained, that ranking is where training starts: each neuron's delta is multiplied by a gate, and the neurons are kept
    whose gates the texts need most.
    """
    from workbench.cli._bricks import brick_directory
    from workbench.cli.documents.analyze import TransplantDocument
    from workbench.emergent.gates import GateSettings
    from workbench.errors import UsageError
    from workbench.library.neurons import TransplantOptions, transplant_set
    from workbench.models.device import pick_device
    from workbench.run.work import Work

    out.quiet = json or quiet
    if steps is not None and not trained:
        raise UsageError("--steps is a setting of the training", "Add --trained.")
    place = str(brick_directory(brick))
    gates = GateSettings(**({} if steps is None else {"steps": steps})) if trained else None
    chosen = transplant_set(
        base,
        place,
        texts,
        TransplantOptions(share, samples, gates),
        project=Path.cwd(),
        work=Work(pick_device(device), events=out.event),
        out=to,
    )

    def text() -> None:
        neurons = chosen.neurons
        moved = neurons.evidence["delta_share"]
        out.line(
            f"{to}: {neurons.size:,} {neurons.kind} ({100 * neurons.share:.3g} %), {100 * moved:.3g} % of the delta's square"
        )
        if trained:
            loss = neurons.evidence["loss"]
            out.line(f"loss:   {loss['kept']:.3f} with these, {loss['whole']:.3f} with all, {loss['none']:.3f} with none")
        out.say(f"use:    where: {{neurons: {to}}} in a merge step with {place}")

    out.result(lambda: TransplantDocument.model_validate(chosen.document()), text, json=json)

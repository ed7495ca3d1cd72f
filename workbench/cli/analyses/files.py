"""Commands `analyze import|export`: sets of neurons in the file form of LAPE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli._options import JsonOpt, QuietOpt
from workbench.cli._output import out


def import_(
    file: Annotated[Path, typer.Argument(help="File *.pth with a list over functions of lists over layers.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="Model of the neurons: directory or hub id.", show_default=False)],
    names: Annotated[
        str,
        typer.Option(
            "--names", metavar="NAMES", help="Names of the functions, in the order of the file: en,zh,fr.", show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="Directory for the sets, one folder each.", show_default=False)],
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Read sets of neurons from a LAPE file (*.neuron.pth), as bricks of a base.

    The file is opened in a process of its own with limits, in which torch runs no code of it. It does not name its model: layers and
    numbers of neurons are compared with the base.
    """
    from workbench.cli.documents.neuron_files import ImportedSet, ImportedSetsDocument
    from workbench.errors import UsageError
    from workbench.library.neurons_files import import_sets

    out.quiet = json or quiet
    labels = [name.strip() for name in names.split(",")]
    if not all(labels):
        raise UsageError(f"--names {names}: expected names separated by commas, such as en,zh,fr")
    found = import_sets(file, str(file), base, labels, to, project=Path.cwd())
    out.warn(f"{file} does not name its model; only layers and numbers of neurons were compared with {base}")

    def text() -> None:
        for name, neurons in found.sets.items():
            out.line(f"{found.folders[name]}: {neurons.size:,} neurons ({100 * neurons.share:.3g} %) for {name}")
        for name in found.empty:
            out.line(f"{name}: no neurons, so no set")

    rows = [
        ImportedSet(function=name, set=str(found.folders[name]), size=neurons.size, share=neurons.share)
        for name, neurons in found.sets.items()
    ]
    out.result(
        lambda: ImportedSetsDocument(base=found.base, digest=found.digest, sets=rows, empty=list(found.empty)), text, json=json
    )


def export(
    sets: Annotated[list[str], typer.Argument(help="Sets of neurons: directories, or names in bricks/.", show_default=False)],
    to: Annotated[Path, typer.Option("-o", "--out", help="New file *.pth.", show_default=False)],
    quiet: QuietOpt = False,
) -> None:
    """Write sets of neurons of one model as a LAPE file, which `torch.load` reads as lists of lists of LongTensor."""
    from workbench.cli._bricks import brick_directory
    from workbench.library.neurons_files import export_sets

    out.quiet = quiet
    written = export_sets([brick_directory(name) for name in sets], to)
    out.line(f"{to}: {len(written)} functions, {max(written[0].units) + 1} layers")
    out.say(f"names:  {','.join(neurons.name for neurons in written)}")

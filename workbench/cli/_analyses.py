"""Parts of `analyze`: its texts, the directory of results with its page, and what is printed of a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli._output import out
from workbench.errors import UsageError, WorkbenchError
from workbench.project import find_project, relative

if TYPE_CHECKING:
    from workbench.activations.labelled import Labelled
    from workbench.neurons.subject import ModelResult, NeuronSubject

ABILITIES = Path("evals", "abilities.jsonl")
"""Texts of a project that analyses read if no others are named."""
SHOWN = 40
"""Largest number of characters of a prompt in a table."""


def results_folder(to: Path | None, name: str) -> Path:
    """Return the directory of a model's results: the value of `-o`, or runs/neurons/MODEL."""
    return to or Path("runs", "neurons", name)


def write_page(place: Path, result: ModelResult) -> Path:
    """Write the page of all analyses of the same model in a directory; those of an earlier content of the same file are left out."""
    from workbench.files import read_json
    from workbench.report.neurons import SECTIONS, render_neurons

    plain = result.to_dict()
    data = plain.get("data") or {}
    known: dict[str, ModelResult] = {}
    for kind, (cls, _) in SECTIONS.items():
        path = place / f"{kind}.json"
        stored = read_json(path, digest=str)
        texts = (stored or {}).get("data") or {}
        stale = texts.get("file") == data.get("file") and texts.get("digest") != data.get("digest")
        if stored is None or stored["digest"] != result.digest or stale:
            continue
        try:
            known[kind] = cls.of(stored, str(path))
        except WorkbenchError:
            out.warn(f"{path}: another version wrote it, so the page leaves it out; analyze the model again")
    return render_neurons(known, place / "index.html")


def labelled_texts(data: Path | None) -> Labelled:
    """Read labelled texts, those of the project if no file is named, and print what they cannot show.

    Raises:
        WorkbenchError: If there is no such file, or it has other rows.
    """
    from workbench.activations.labelled import EXPECTED, read_labelled

    if data is None:
        data = relative(find_project() / ABILITIES)
        if not data.is_file():
            raise UsageError(
                f"{data}: this project has no labelled texts, which analyses need", f"Name a file with --data. {EXPECTED}"
            )
    read = read_labelled(data, str(data))
    for warning in read.warnings:
        out.warn(warning)
    if read.several:
        out.say(f"{read.several} rows with several functions are left out")
    return read


def open_subject(model: str, device: str) -> NeuronSubject:
    """Load a recipe's result, or a model, with its neurons."""
    from workbench.api.naming import open_named
    from workbench.models.identity import pick_device
    from workbench.neurons.subject import open_neurons

    return open_neurons(open_named(model, out.event), pick_device(device), out.event)


def say(result: ModelResult) -> None:
    """Print the first section that a result has on the page: its sentences, tables and details."""
    from workbench.report.neurons import SECTIONS

    section = SECTIONS[result.kind][1](result)[0]
    for line in section.lead:
        out.line(line)
    rows = [[row[0] if len(row[0]) <= SHOWN else f"…{row[0][1 - SHOWN :]}", *row[1:]] for row in section.rows]
    out.table(list(section.columns), rows, right=range(1, len(section.columns)))
    for table in section.tables:
        out.line(f"\n{table.title}" + (f" ({table.caption.rstrip('.')})" if table.caption else ""))
        cells = [[name, *(cell.text for cell in row)] for name, row in table.rows]
        out.table([table.corner, *table.columns], cells, right=range(1, 1 + len(table.columns)))
    for line in section.details:
        out.line(line)

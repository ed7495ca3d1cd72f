"""Parts that the commands of `analyze` share: arguments, the subject and its texts, the directory of results and its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli._output import out

if TYPE_CHECKING:
    from workbench.cli.documents.document import Document
    from workbench.emergent.labelled import Labelled
    from workbench.library.neurons_subject import NeuronSubject


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


def results_folder(to: Path | None, name: str) -> Path:
    """Return the directory of a model's results: the value of `-o`, or runs/neurons/MODEL."""
    return to or Path("runs", "neurons", name)


def finish(document: dict[str, Any], place: Path, json: bool, say: Callable[[dict[str, Any]], None], cls: type[Document]) -> None:
    """Print a document or its table, and write the page of all analyses in the directory."""
    page = write_page(place, document)
    out.result(lambda: cls.model_validate(document), lambda: say(document), json=json)
    out.say(f"written: {page}")


def write_page(place: Path, document: dict[str, Any]) -> Path:
    """Write the page of all analyses of the same model in a directory; those of an earlier content of the same file are left out."""
    from workbench.files import read_json
    from workbench.library.neurons_functions import VERSION
    from workbench.report.neurons import SECTIONS, render_neurons

    stored = {kind: read_json(place / f"{kind}.json", digest=str) for kind in SECTIONS}
    data = document.get("data") or {}

    def belongs(other: dict[str, Any]) -> bool:
        texts = other.get("data") or {}
        stale = texts.get("file") == data.get("file") and texts.get("digest") != data.get("digest")
        return other["digest"] == document["digest"] and not stale

    known = {kind: other for kind, other in stored.items() if other is not None and belongs(other)}
    if known.get("functions", {"version": VERSION}).get("version") != VERSION:
        out.warn(
            f"{place / 'functions.json'}: another version wrote it; the page leaves it out. Run `workbench analyze functions` again."
        )
        del known["functions"]
    return render_neurons(known, place / "index.html")


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers of an option, separated by commas.

    Raises:
        UsageError: If a part is no number.
    """
    from workbench.errors import UsageError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers separated by commas, such as 0,50,80") from None


def labelled_texts(data: Path) -> Labelled:
    """Read the labelled texts and print what they cannot show."""
    from workbench.emergent.labelled import read_labelled

    texts = read_labelled(data, str(data))
    for warning in texts.warnings:
        out.warn(warning)
    if texts.several:
        out.say(f"{texts.several} rows with several functions are left out")
    return texts


def open_subject(model: str, device: str) -> NeuronSubject:
    """Load a recipe's result, or a model, with its neurons."""
    from workbench.api.naming import open_named
    from workbench.library.neurons_subject import open_neurons
    from workbench.models.identity import pick_device

    return open_neurons(open_named(model, out.event), pick_device(device), out.event)

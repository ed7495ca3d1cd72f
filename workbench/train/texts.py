"""Texts that are trained on and texts that are held out: from a jsonl file, or from a data set that `datasets` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError, nearest
from workbench.files import file_digest, json_digest
from workbench.models.texts import Text, read_texts
from workbench.train.spec import HubData, TrainSpec

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Texts:
    """What a training reads.

    Attributes:
        trained: Trained on, in the order of the source.
        held_out: Never trained on.
        digests: Of the trained rows, of the file that they came from, of the held-out rows.
    """

    trained: list[Text]
    held_out: list[Text]
    digests: dict[str, str]


def training_texts(spec: TrainSpec, data: Path, folder: Path) -> Texts:
    """Read `data` and `held_out` of a spec.

    Args:
        spec: The settings.
        data: The jsonl file of training rows; not looked at where the spec names a data set.
        folder: What the other names start at.

    Errors: as `read_texts` and `hub_texts`; a held-out row that is trained on too; a share that leaves nothing to train on.
    """
    found = hub_texts(spec.data, folder) if isinstance(spec.data, HubData) else _file(data)
    held: list[Text] = []
    if isinstance(spec.held_out, str):
        held = _file(folder / spec.held_out)
        _refuse_trained(held, found, spec.held_out)
    elif spec.held_out is not None:
        found, held = split(found, spec.held_out)
    digests = {"rows": rows_digest(found)}
    if not isinstance(spec.data, HubData):
        digests["file"] = file_digest(data)
    if held:
        digests["held_out"] = rows_digest(held)
    return Texts(found, held, digests)


def training_cost(spec: TrainSpec, folder: Path) -> dict[str, int]:
    """Optimizer steps, and about how many tokens go forward and back, four characters each; of a data set only the former.

    Args:
        folder: What file names in the spec start at.
    """
    if isinstance(spec.data, HubData):
        return {"train_steps": spec.steps}
    texts = training_texts(spec, folder / spec.data, folder).trained
    mean = sum(len(text.prompt) + len(text.answer) for text in texts) / (4 * len(texts))
    return {"train_steps": spec.steps, "tokens": round(mean * spec.steps * spec.batch_size)}


def rows_digest(texts: list[Text]) -> str:
    """Digest of rows: of the canonical JSON of all (prompt, completion), in their order."""
    return json_digest([(text.prompt, text.answer) for text in texts])


def split(texts: list[Text], share: float) -> tuple[list[Text], list[Text]]:
    """(trained, held out): about a share of the prompts is held out, chosen by their hash.

    A row's side depends on its prompt alone (a whole text is its own), not on its place or on the other rows, so rows of one prompt
    stay together. Where the hash holds out none, the prompt with the lowest is.
    Errors: nothing left to train on.
    """
    places = {key: int(json_digest(["held out", key]), 16) / 2**128 for key in map(_key, texts)}
    held = {key for key, place in places.items() if place < share} or {min(places, key=places.__getitem__)}
    trained = [text for text in texts if _key(text) not in held]
    if not trained:
        raise WorkbenchError(
            f"held_out: a share of {share:g} of {len(places)} different prompts leaves none to train on",
            "Name a smaller share, or a file of held-out rows.",
            2,
        )
    return trained, [text for text in texts if _key(text) in held]


def _key(text: Text) -> str:
    return text.prompt or text.answer


def _file(path: Path) -> list[Text]:
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        hint = f"{nearest(path.name, near)} " if near else ""
        raise WorkbenchError(f"{path.name}: no such file of training rows", f"{hint}Check the file names of the training.", 2)
    return read_texts(path, path.name)


def _refuse_trained(held: list[Text], trained: list[Text], name: str) -> None:
    """Errors: rows that stand on both sides."""
    known = {(text.prompt, text.answer) for text in trained}
    both = [text for text in held if (text.prompt, text.answer) in known]
    if both:
        raise WorkbenchError(
            f"{both[0].place}: the row is trained on too, {len(both)} of {len(held)} held-out rows are",
            f"Take them out of the training rows or out of {name}, or set `held_out: 0.1` instead.",
            2,
        )


def hub_texts(source: HubData, folder: Path) -> list[Text]:
    """Rows of a data set.

    Args:
        source: Which one, and its columns.
        folder: What a local folder or file starts at; one that exists wins over an id of the hub.

    Errors: no such data set, configuration, split or column; a cell that is no text or an empty one.
    """
    rows = _load(source, folder)
    wanted = [column for column in (source.prompt, source.completion) if column is not None]
    for column in wanted:
        if column not in rows.column_names:
            raise WorkbenchError(
                f"data: {source.hub} has no column '{column}', it has {', '.join(rows.column_names)}",
                f"{nearest(column, rows.column_names)} Name it as `prompt:` or `completion:`.",
                2,
            )
    texts = []
    for number, row in enumerate(rows.select_columns(wanted)):
        place = f"{source.hub} {source.split} row {number}"
        for column in wanted:
            if not isinstance(row[column], str) or not row[column].strip():
                found = "an empty text" if isinstance(row[column], str) else type(row[column]).__name__
                raise WorkbenchError(f"data: {place}: expected a text in '{column}', found {found}", "Name another column.", 2)
        texts.append(Text(row[source.prompt] if source.prompt else "", row[source.completion], place))
    if not texts:
        raise WorkbenchError(f"data: {source.hub}: {source.split} holds no rows", "Name another `split:`.", 2)
    return texts


def _load(source: HubData, folder: Path) -> Any:
    """The split as `datasets` gives it. Errors: in the words of train.yaml."""
    import datasets
    from datasets.exceptions import DatasetsError

    local = folder / Path(source.hub).expanduser()
    given: dict[str, Any] = {"name": source.config, "split": source.split, "revision": source.revision}
    if local.is_file():
        if local.suffix not in _FORMATS:
            raise WorkbenchError(
                f"data: {source.hub}: expected one of {', '.join(_FORMATS)}, found {local.suffix or 'none'}", None, 2
            )
        name, given = _FORMATS[local.suffix], {"data_files": str(local), "split": source.split}
    else:
        name = str(local.resolve()) if local.is_dir() else source.hub
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        return datasets.load_dataset(name, **given)
    except (OSError, ValueError, DatasetsError) as error:
        raise _no_data(source, folder, error) from None
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()


def _no_data(source: HubData, folder: Path, error: Exception) -> WorkbenchError:
    """What `datasets` could not find, and where to change it."""
    text = " ".join(str(error).split())
    if "Unknown split" in text or "instruction format" in text:
        return WorkbenchError(f"data: {source.hub}, split '{source.split}': {text}", "Set `split:` to one that it has.", 2)
    if "BuilderConfig" in text or "Config name" in text:
        return WorkbenchError(f"data: {source.hub}, config '{source.config}': {text}", "Set `config:` to one that it has.", 2)
    return WorkbenchError(
        f"data: expected a data set of the hub or a folder of data files in {folder}, found none at '{source.hub}' ({text})",
        "Check the id and the network; a folder or a jsonl, parquet or csv file here is named relative to train.yaml, or to the project in a recipe.",
        2,
    )

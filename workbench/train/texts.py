"""Training and held-out texts, from a jsonl file or a data set that `datasets` reads, and their tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import InvalidRecipeError, WorkbenchError, nearest
from workbench.ground.files import file_digest, json_digest
from workbench.ground.http import refused_cache
from workbench.ground.project import suggestion
from workbench.models.prompts import plain
from workbench.models.texts import Text, conversation, read_texts
from workbench.train.rows import encode_row, read_replay, replay
from workbench.train.spec import HubData, TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Texts:
    """The texts of a training.

    Attributes:
        trained: Texts to train on, in the order of the source.
        held_out: Texts that are never trained on.
        digests: Digests of the training rows ("rows"), their file ("file") and the held-out rows ("held_out").
    """

    trained: list[Text]
    held_out: list[Text]
    digests: dict[str, str]


def training_texts(spec: TrainSpec, data: Path, folder: Path, *, chat: bool = True) -> Texts:
    """Read `data` and `held_out` of a spec.

    Args:
        spec: The settings.
        data: The jsonl file of training rows; ignored if the spec names a data set.
        folder: Directory that other file names in the spec start from.
        chat: Whether conversations are read; otherwise they are refused.

    Raises:
        WorkbenchError: If `read_texts` or `hub_texts` rejects a row, a held-out row is also a training row, or the share of
            held-out rows leaves nothing to train on.
    """
    training = hub_texts(spec.data, folder, chat) if isinstance(spec.data, HubData) else _read_file(data, chat)
    held_out: list[Text] = []
    if isinstance(spec.held_out, str):
        held_out = _read_file(folder / spec.held_out, chat)
        rows = {(text.prompt, text.answer) for text in training}
        if in_both := [text for text in held_out if (text.prompt, text.answer) in rows]:
            raise InvalidRecipeError(
                f"{in_both[0].place}: this held-out row is also a training row ({len(in_both)} of {len(held_out)} held-out rows are)",
                f"Remove these rows from the training rows or from {spec.held_out}, or set `held_out: 0.1` instead.",
            )
    elif spec.held_out is not None:
        training, held_out = split(training, spec.held_out)
    digests = {"rows": rows_digest(training)}
    if not isinstance(spec.data, HubData):
        digests["file"] = file_digest(data)
    if held_out:
        digests["held_out"] = rows_digest(held_out)
    return Texts(training, held_out, digests)


def training_cost(spec: TrainSpec, folder: Path) -> dict[str, int]:
    """Estimate the cost of a training: optimizer steps, and trained tokens at four characters per token.

    A data set is not read for the estimate, so its tokens are left out, and its steps if they follow from the number of rows.

    Args:
        spec: The settings.
        folder: Directory that file names in the spec start from.
    """
    if isinstance(spec.data, HubData):
        return {} if spec.epochs else {"train_steps": spec.steps}
    texts = training_texts(spec, folder / spec.data, folder).trained
    mean = sum(len(text.prompt) + len(text.answer) for text in texts) / (4 * len(texts))
    rows = sum(spec.rows_per_pass(len(texts))) * (spec.epochs or 1)
    return {"train_steps": spec.with_steps(len(texts)).steps, "tokens": round(mean * rows)}


def rows_digest(texts: list[Text]) -> str:
    """Return the digest of rows: of the canonical JSON of all (prompt, completion) pairs in order."""
    return json_digest([(text.prompt, text.answer) for text in texts])


def split(texts: list[Text], share: float) -> tuple[list[Text], list[Text]]:
    """Split rows into (trained, held out), choosing about a share of the prompts by their hash.

    The choice depends only on a row's prompt (or its whole text), not on its position or on other rows, so rows of one prompt
    stay together. At least one prompt is held out, the one with the lowest hash.

    Raises:
        WorkbenchError: If nothing is left to train on.
    """
    positions = {key: int(json_digest(["held out", key]), 16) / 2**128 for key in map(_key, texts)}
    held_out_keys = {key for key, position in positions.items() if position < share} or {
        min(positions, key=positions.__getitem__)
    }
    training = [text for text in texts if _key(text) not in held_out_keys]
    if not training:
        raise InvalidRecipeError(
            f"held_out: a share of {share:g} of {len(positions)} different prompts leaves none to train on",
            "Set a smaller share, or name a file of held-out rows.",
        )
    return training, [text for text in texts if _key(text) in held_out_keys]


def _key(text: Text) -> str:
    """Return the text by which a row is split: its prompt, or its whole text; of a conversation, what comes before the first answer."""
    if text.messages:
        return plain(list(takewhile(lambda message: message.role != "assistant", text.messages)))
    return text.prompt or text.answer


def _read_file(path: Path, chat: bool) -> list[Text]:
    """Read a jsonl file of training rows; raise WorkbenchError if it does not exist."""
    if not path.is_file():
        hint = f"{suggestion(path)} Check `data:` and `held_out:`.".lstrip()
        raise InvalidRecipeError(f"{path.name}: no such file of training rows", hint)
    return read_texts(path, path.name, chat=chat)


def hub_texts(source: HubData, folder: Path, chat: bool = True) -> list[Text]:
    """Read the rows of a data set.

    Args:
        source: The data set and its columns.
        folder: Directory that a local folder or file starts from; an existing one takes precedence over a hub id.
        chat: Whether conversations are read; otherwise they are refused.

    Raises:
        WorkbenchError: If there is no such data set, configuration, split or column, or a cell is not a text or is empty.
    """
    rows = _load(source, folder)
    named = (source.messages, source.tools) if source.messages else (source.prompt, source.completion)
    columns = [column for column in named if column is not None]
    for column in columns:
        if column not in rows.column_names:
            raise InvalidRecipeError(
                f"data: {source.hub} has no column '{column}', it has {', '.join(rows.column_names)}",
                f"{nearest(column, rows.column_names)} Set `prompt:`, `completion:`, `messages:` or `tools:` to one of its columns.",
            )
    texts = []
    for number, row in enumerate(rows.select_columns(columns)):
        place = f"{source.hub} {source.split} row {number}"
        if source.messages:
            tools = {"tools": _without_nulls(row[source.tools])} if source.tools else {}
            texts += conversation({"messages": _without_nulls(row[source.messages]), **tools}, place, chat)
            continue
        for column in columns:
            if not isinstance(row[column], str) or not row[column].strip():
                actual = "an empty text" if isinstance(row[column], str) else type(row[column]).__name__
                raise InvalidRecipeError(f"data: {place}: expected a text in '{column}', found {actual}", "Use another column.")
        texts.append(Text(row[source.prompt] if source.prompt else "", row[source.completion], place))
    if not texts:
        raise InvalidRecipeError(f"data: {source.hub}: the split {source.split} has no rows", "Set `split:` to another split.")
    return texts


def _without_nulls(cell: Any) -> Any:
    """Return a cell without its nulls, which `datasets` writes where another row has a key that this one lacks."""
    if isinstance(cell, dict):
        return {key: _without_nulls(value) for key, value in cell.items() if value is not None}
    return [_without_nulls(value) for value in cell] if isinstance(cell, list) else cell


def _load(source: HubData, folder: Path) -> Any:
    """Load the split with `datasets`; raise WorkbenchError in terms of train.yaml if that fails."""
    import datasets
    from datasets.exceptions import DatasetsError

    local = folder / Path(source.hub).expanduser()
    arguments: dict[str, object] = {"name": source.config, "split": source.split, "revision": source.revision}
    if local.is_file():
        if local.suffix not in _FORMATS:
            raise InvalidRecipeError(
                f"data: {source.hub}: expected a file name that ends in {', '.join(_FORMATS)}; found {local.suffix or 'no ending'}"
            )
        name, arguments = _FORMATS[local.suffix], {"data_files": str(local), "split": source.split}
    else:
        name = str(local.resolve()) if local.is_dir() else source.hub
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        return datasets.load_dataset(name, **arguments)
    except (OSError, ValueError, DatasetsError) as error:
        raise (refused_cache(error, f"data: {source.hub}") or _missing_data_error(source, folder, error)) from None
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()


def _missing_data_error(source: HubData, folder: Path, error: Exception) -> WorkbenchError:
    """Return an error that says what `datasets` could not find, and which setting to change."""
    text = " ".join(str(error).split())
    if "Unknown split" in text or "instruction format" in text:
        hint = "Set `split:` to a split of the data set."
        return InvalidRecipeError(f"data: {source.hub}, split '{source.split}': {text}", hint)
    if "BuilderConfig" in text or "Config name" in text:
        hint = "Set `config:` to a configuration of the data set."
        return InvalidRecipeError(f"data: {source.hub}, config '{source.config}': {text}", hint)
    return InvalidRecipeError(
        f"data: expected a data set on the hub or a folder of data files in {folder}, found none at '{source.hub}' ({text})",
        "Check the id and the network. Local folders and jsonl, parquet or csv files are relative to train.yaml, or to the project "
        "in a recipe.",
    )


Tokens = tuple[list[int], int]
"""Token ids of a row, and the number of tokens at its end that are learned."""


@dataclass(frozen=True)
class Inputs:
    """The data of a training, which is read before any model is loaded.

    Attributes:
        texts: Training and held-out texts.
        skill: Tokens of the training texts.
        held_out: Tokens of the held-out texts.
        replayed: Replayed prompts with their completion, or None if the model samples it.
    """

    texts: Texts
    skill: list[Tokens]
    held_out: list[Tokens]
    replayed: list[tuple[str, str | None]]


def read_inputs(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, data: Path, folder: Path, *, chat: bool = True) -> Inputs:
    """Read and tokenize the data of a training.

    Args:
        spec: Settings of the training.
        tokenizer: Tokenizer of the base.
        data: The jsonl file of training rows.
        folder: Directory that other file names in the spec start from.
        chat: Whether conversations are read; otherwise they are refused.

    Raises:
        WorkbenchError: If a file or data set is missing or has a bad row.
    """
    texts = training_texts(spec, data, folder, chat=chat)

    def encoded(part: list[Text]) -> list[Tokens]:
        return [encode_row(tokenizer, text, spec.max_length, spec.learn_end) for text in part]

    prompts = read_replay(folder / spec.replay) if spec.replay else []
    return Inputs(texts, encoded(texts.trained), encoded(texts.held_out), prompts)


def scheduled(
    spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Inputs
) -> tuple[list[Tokens], int]:
    """Return the rows of one pass over the data, and the number of replayed rows at their end."""
    own, count = spec.rows_per_pass(len(inputs.skill))
    replayed = replay(spec, model, tokenizer, inputs.replayed, count) if inputs.replayed else []
    return [inputs.skill[index % len(inputs.skill)] for index in range(own)] + replayed, len(replayed)


@contextlib.contextmanager
def state_restored(model: PreTrainedModel | None) -> Iterator[None]:
    """Restore gradient flags, mode and cache setting of the caller's model after a training; None does nothing."""
    if model is None:
        yield
        return
    flags, mode, cache = [(p, p.requires_grad) for p in model.parameters()], model.training, model.config.use_cache
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(mode)
        model.config.use_cache = cache

"""Continuation of the stream of an earlier run: its statements, its values, and the layers that it has edited.

A continued stream is one stream: the statements of the run, then the rows of the new file, solved from the weights that the run was
solved on. The batches of the run that the new rows leave alone take their values from the run's history file, so that no value of
them is optimized again and they give the same bytes. A metric is not stored: its factor has inputs × inputs numbers, the keys have
inputs × statements, and the solves build the factor again from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, StrictInt, ValidationError, model_validator

from workbench.edit.closed_form.values import PARTS
from workbench.edit.places.parts import Position
from workbench.facts.facts import EXPECTED, FACTS, Fact, fact_of, read_rows
from workbench.facts.published import read_facts
from workbench.facts.stream import Start, latest
from workbench.ground.errors import InvalidRecipeError
from workbench.ground.files import file_digest, read_json
from workbench.ground.manifest import require_whole
from workbench.ground.results import JsonObject
from workbench.weights.header import read_header, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

RECORD, STREAM, HISTORY = "edit.json", "stream.jsonl", "history.safetensors"
_CHOICE = ("layers", "position", "positions", "pilot", "trace", "candidates", "sweep")
"""Entries of the record that say where facts are written, and why."""
_KEY = re.compile("[0-9a-f]{32}")
_AGAIN = "Copy the directory of the run again, or delete the run with `workbench runs rm` and run its recipe again."
_FREE = frozenset({"id", "facts", "first", "continues", "min_efficacy", "layers", "position"})
"""Fields that may differ from those of the run; layers and positions are compared by their values in its record."""


class _Digests(JsonObject):
    """Digests of the files of a stream's statements and values."""

    stream: str
    digest: str


class _Written(JsonObject):
    """Entries of edit.json that the continuation of a stream reads; `positions` are measured, `position` is named by the step."""

    method: str = ""
    step: dict[str, object]
    layers: tuple[StrictInt, ...] = Field(min_length=1)
    position: Position | None = None
    positions: dict[int, Position] | None = None
    history: _Digests

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        if self.position is None if self.positions is None else not self.positions.keys() >= set(self.layers):
            raise ValueError("a layer has no position")
        return self


@dataclass(frozen=True)
class Earlier:
    """The edit of an earlier run, whose stream a step continues.

    Attributes:
        name: Directory as the recipe names it, with the edit's folder.
        path: The directory.
        record: Content of its edit.json.
        written: The entries of it that a stream needs.
    """

    name: str
    path: Path
    record: Mapping[str, object]
    written: _Written

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it has edited."""
        return self.written.layers

    @property
    def positions(self) -> dict[int, Position]:
        """Layer -> token at which its facts are looked up."""
        measured, named = self.written.positions, self.written.position
        if measured is None:
            assert named is not None, "checked when the record is read"
            return dict.fromkeys(self.layers, named)
        return {layer: measured[layer] for layer in self.layers}

    @property
    def choice(self) -> dict[str, object]:
        """The entries of its record about layers and positions."""
        return {name: self.record[name] for name in _CHOICE if name in self.record}

    def start(self) -> Start:
        """Return its statements, in order.

        Raises:
            WorkbenchError: If the file does not have the digest in the record.
        """
        self._check(STREAM, self.written.history.stream)
        label = f"{self.name}/{STREAM}"
        return Start(self.name, tuple(fact_of(row.data, row.place) for row in read_rows(self.path / STREAM, label, EXPECTED)))

    def check_history(self) -> dict[str, list[str]]:
        """Check the file of its values from its digest and its header.

        Returns:
            Key of each value in the cache -> names of its tensors in the file.

        Raises:
            WorkbenchError: If the file is missing or damaged, or has other tensors than those of values.
        """
        self._check(HISTORY, self.written.history.digest)
        parts: dict[str, list[str]] = {}
        for name in read_header(self.path / HISTORY, watched=False):
            parts.setdefault(name.partition(".")[0], []).append(name)
        for value, names in parts.items():  # a key becomes the name of a file
            if not _KEY.fullmatch(value) or sorted(names) != sorted(f"{value}.{part}" for part in PARTS):
                problem = f"is damaged: '{names[0]}' is no part of a value"
                raise InvalidRecipeError(f"continues: {self.name}: {HISTORY} {problem}", _AGAIN)
        return parts

    def restore(self, cache: Path) -> None:
        """Write its values into the cache, as far as they are not there, so that they are not optimized again."""
        from safetensors import safe_open

        values = self.check_history()
        with safe_open(self.path / HISTORY, "pt") as stored:
            for value, names in values.items():
                file = cache / "values" / f"{value}.safetensors"
                if not file.is_file():
                    save_tensors({name.partition(".")[2]: stored.get_tensor(name) for name in names}, file)

    def _check(self, file: str, digest: str) -> None:
        """Raise WorkbenchError unless a file has a digest."""
        place = self.path / file
        problem = "is missing" if not place.is_file() else "is damaged: its content is not what the run has written"
        if not place.is_file() or file_digest(place) != digest:
            raise InvalidRecipeError(f"continues: {self.name}: {file} {problem}", _AGAIN)


def history_of(files: Iterable[Path]) -> dict[str, Tensor]:
    """Return values in the cache as tensors of one file: "VALUE.PART" -> the part, such as the key."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as stored:
            tensors |= {f"{file.stem}.{name}": stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
    return tensors


def earlier_facts(edits: Iterable[Path]) -> list[Fact]:
    """Return the facts that some edits have written, with their last values; facts that an edit has skipped are left out.

    Args:
        edits: Directories of the edits, in the order in which they were made.
    """
    stated: list[Fact] = []
    for edit in edits:
        record = read_json(edit / RECORD) or {}
        skipped = {row["id"] for row in record.get("facts", ()) if isinstance(row, dict) and row.get("skipped")}
        facts = read_facts(edit / FACTS, str(edit / FACTS)) if (edit / FACTS).is_file() else []
        stated += [fact for fact in facts if fact.id not in skipped]
    return latest(stated)


def find_edit(continues: str, project: Path) -> tuple[Path, str]:
    """Return the directory of the edit that a reference names, and its name in messages.

    Args:
        continues: Directory of a run with one edit, or of the edit.
        project: Folder that it is relative to.

    Raises:
        InvalidRecipeError: If there is no such directory, or it has no edit or several.
    """
    folder, name = project / continues, continues.rstrip("/")
    if not folder.is_dir():
        raise InvalidRecipeError(
            f"continues: no such directory: {continues}", "`workbench runs ls` lists runs; write `runs/NAME`."
        )
    if (folder / RECORD).is_file():
        return folder, name
    edits = edits_of(folder)
    held = [edit for edit in edits if (edit / STREAM).is_file()]
    if len(held) == 1 or len(edits) == 1:
        edit = (held or edits)[0]
        return edit, f"{name}/edits/{edit.name}"
    if held or edits:
        listed = ", ".join(edit.name for edit in held or edits)
        raise InvalidRecipeError(
            f"continues: {continues} has {len(held or edits)} edits ({listed})",
            f"Name one of them: `continues: {name}/edits/{(held or edits)[-1].name}`.",
        )
    run = folder.parent
    raise InvalidRecipeError(
        f"continues: {continues} has no edit (no {RECORD}, and no edits/STEP/{RECORD})",
        f"Name the run: `continues: {name.rpartition('/')[0]}`."
        if edits_of(run)
        else "Name the directory of a run with an edit step.",
    )


def edits_of(run: Path) -> list[Path]:
    """Return the directories of a run's edits, sorted by name."""
    return sorted(file.parent for file in run.glob(f"edits/*/{RECORD}"))


def without_history(record: Mapping[str, object]) -> str | None:
    """Return why an edit has no history, as a clause; None if it has one.

    Args:
        record: Content of its edit.json.
    """
    history, step = record.get("history"), record.get("step")
    if isinstance(history, Mapping) and {"stream", "digest"} <= set(history):
        return None
    step = step if isinstance(step, Mapping) else {}
    if step.get("mode") == "joint":
        return "it has solved its facts together (`mode: joint`)"
    if "contexts" not in step:
        return f"`edit: {record.get('method')}` keeps none"
    return "it was written before runs kept one"


def read_earlier(continues: str, project: Path) -> Earlier:
    """Read the edit of an earlier run.

    Args:
        continues: Directory of a run with one edit, or of the edit.
        project: Folder that it is relative to.

    Raises:
        InvalidRecipeError: If there is no such edit, or it has no history.
        GateFailedError: If a file of the edit is not as it was written.
    """
    path, name = find_edit(continues, project)
    require_whole(path)
    record = read_json(path / RECORD)
    if record is None:
        raise InvalidRecipeError(f"continues: {name}/{RECORD} is not JSON", _AGAIN)
    if reason := without_history(record):
        raise InvalidRecipeError(
            f"continues: {name} has no history, because {reason}",
            "To start without a history on its result, remove `continues` and write `base: runs/NAME/model`. To get a history, run its "
            "recipe again with `mode: {sequential: {batch: N}}` and a closed-form method (`workbench methods`).",
        )
    try:
        return Earlier(name, path, record, _Written.model_validate(record))
    except ValidationError:
        raise InvalidRecipeError(
            f"continues: {name}/{RECORD} is damaged: it is no record of a closed-form edit", _AGAIN
        ) from None


def check_fields(step: Mapping[str, object], defaults: Mapping[str, object], earlier: Earlier) -> None:
    """Check that a step has the method and the settings of the run that it continues.

    Args:
        step: Fields of the step, as plain data.
        defaults: Field -> its default, for fields that the run's record leaves out.
        earlier: The edit of the run.

    Raises:
        InvalidRecipeError: If one of them differs.
    """
    written, method = {**defaults, **earlier.written.step}, earlier.written.method
    if step["edit"] != method:
        raise InvalidRecipeError(
            f"edit {step['edit']}: {earlier.name} was written by `edit: {method}`, and a stream has one method",
            f"Write `edit: {method}`.",
        )
    differing = [name for name in step if name not in _FREE and step[name] != written.get(name)]
    if isinstance(layers := step["layers"], list) and sorted(layers) != sorted(earlier.layers):
        differing.append("layers")
    if step["position"] not in ("auto", *set(earlier.positions.values())):
        differing.append("position")
    if differing:
        held = {**written, "layers": list(earlier.layers), "position": next(iter(earlier.positions.values()))}
        fields = ", ".join(f"{name}: {_text(step[name])} instead of {_text(held.get(name))}" for name in differing)
        raise InvalidRecipeError(
            f"edit {step['edit']}: {earlier.name} was solved with other settings, and a stream has one: {fields}",
            "Write " + ", ".join(f"`{name}: {_text(held.get(name))}`" for name in differing) + ".",
        )


def _text(value: Any) -> str:
    """Return plain data as YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)

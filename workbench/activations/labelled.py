"""Texts labelled with a function, which choose neurons and judge them.

A file has one JSON object per line: {"prompt", "function"} and, optionally, "response", "task", "split" and "id". A function with several
tasks can be told apart from the wording of one task: some tasks choose neurons, other tasks judge them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from workbench.facts.facts import joined
from workbench.ground import jsondoc
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.files import file_digest, json_digest
from workbench.ground.identity import open_unchanged
from workbench.ground.project import suggestion
from workbench.models.prompts import encode_pair, encode_text
from workbench.models.texts import ANSWERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split: TypeAlias = Literal["train", "heldout"]
TextPart: TypeAlias = Literal["prompt", "whole"]
"""Part of a text that the model reads: the prompt alone, or prompt and response."""
SPLITS: tuple[Split, ...] = ("train", "heldout")
FEWEST = 2  # items of a function: with one item, average precision is the rank of that item
EXPECTED = (
    'Write {"prompt": "...", "function": "math", "response": "...", "task": "sums"} on each line; response and task are optional.'
)
"""Hint of errors: it shows a row of a file."""


def folder_name(function: str) -> str:
    """Return a function's name as the name of a folder and a brick: "ethics-and-moral" for "Ethics and Moral"."""
    return re.sub(r"[^a-z0-9]+", "-", function.lower()).strip("-") or "function"


@dataclass(frozen=True)
class Item:
    """A text with its function.

    Attributes:
        id: Name of the item; its number in the file if the file has none.
        prompt: The instruction.
        response: The answer; empty if the file has none.
        function: The function that the text needs.
        task: The task that it comes from; the function's name if the file has none.
        split: "train" items choose neurons, "heldout" items judge them.
        place: Its place, as file:line.
    """

    id: str
    prompt: str
    response: str
    function: str
    task: str
    split: Split
    place: str


@dataclass(frozen=True)
class Labelled:
    """A file of labelled texts.

    Attributes:
        items: The texts with exactly one function, in file order.
        file: The file, as the user named it.
        digest: Digest of the file.
        several: Number of rows left out because they have several functions.
        warnings: Sentences about what the data cannot show.
    """

    items: tuple[Item, ...]
    file: str
    digest: str
    several: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the functions, in order of first appearance."""
        return tuple(dict.fromkeys(item.function for item in self.items))

    @property
    def all_tasks(self) -> tuple[tuple[str, str], ...]:
        """Function and name of every task, in order of first appearance."""
        return tuple(dict.fromkeys((item.function, item.task) for item in self.items))

    @property
    def task_of_items(self) -> list[int]:
        """Number of each item's task among all tasks."""
        number = {task: i for i, task in enumerate(self.all_tasks)}
        return [number[item.function, item.task] for item in self.items]

    def tasks(self, function: str, split: Split | None = None) -> tuple[str, ...]:
        """Return the tasks of a function, in order of first appearance."""
        return tuple(dict.fromkeys(i.task for i in self.items if i.function == function and (split is None or i.split == split)))

    def in_split(self, split: Split) -> tuple[Item, ...]:
        """Return the items of a split."""
        return tuple(item for item in self.items if item.split == split)


@dataclass(frozen=True)
class ItemRow:
    """A labelled text as tokens.

    Attributes:
        tokens: Tokens of prompt and response.
        prompt: Number of the prompt's tokens.
    """

    tokens: list[int]
    prompt: int

    def read(self, part: TextPart) -> list[int]:
        """Return the tokens of a part of the text."""
        return self.tokens[: self.prompt] if part == "prompt" else self.tokens


def read_labelled(path: Path, shown: str) -> Labelled:
    """Read a file of labelled texts.

    Rows carry `function`, or `labels`, a list. Rows with several functions are left out, as in the paper. If no row has `split`, every
    second task of a function becomes held-out; a function with one task is split by items.

    Args:
        path: The file.
        shown: Its name in messages.

    Raises:
        WorkbenchError: If the file is missing or not JSON, a row has no prompt or no label, a function has too few items, or there are
            fewer than two functions. The message names file and line.
    """
    rows: list[tuple[Item, str | None]] = []
    several = 0
    try:
        with open_unchanged(path):
            for line, row in jsondoc.lines(path, shown, EXPECTED):
                names = _functions(row, f"{shown}:{line}")
                if len(names) == 1:
                    rows.append(_item(row, names[0], f"{shown}:{line}", len(rows)))
                several += len(names) > 1
            digest = file_digest(path)
    except FileNotFoundError:
        raise WorkbenchError(f"{shown}: no such file of labelled texts", suggestion(path) or None) from None
    counts = Counter(item.function for item, _ in rows)
    if not rows:
        raise WorkbenchError(f"{shown}: no row has exactly one function", EXPECTED)
    if len(counts) < 2:
        raise WorkbenchError(
            f"{shown}: all rows have the function '{next(iter(counts))}'; a function is found by comparison with others",
            "Add texts of other functions.",
        )
    by_folder: dict[str, str] = {}
    for name in counts:
        if (other := by_folder.setdefault(folder_name(name), name)) != name:
            raise WorkbenchError(
                f"{shown}: the functions '{other}' and '{name}' differ only in case or signs",
                "Give them names that differ in letters.",
            )
    if few := [name for name, count in counts.items() if count < FEWEST]:
        raise WorkbenchError(
            f"{shown}: function '{few[0]}' has {counts[few[0]]} item, expected at least {FEWEST}",
            "Add items or remove the function.",
        )
    items, warnings = _with_splits(rows, shown)
    # The null keeps the digests of earlier versions, by which stored sets know their texts.
    return Labelled(items, shown, json_digest([digest, None]), several, tuple(warnings))


def _functions(row: Any, place: str) -> list[str]:
    """Return the functions of a row."""
    if not isinstance(row, dict):
        raise WorkbenchError(f"{place}: expected an object, found {jsondoc.kind(row)}", EXPECTED)
    given = row.get("function", row.get("labels", row.get("label")))
    labels = [given] if isinstance(given, str) else given
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        found = "no label" if given is None else f"'{given}'" if isinstance(given, str) else jsondoc.kind(given)
        raise WorkbenchError(
            f"{place}: expected the function as text in 'function', or a list of labels in 'labels'; found {found}", EXPECTED
        )
    return list(dict.fromkeys(labels))


def _item(row: dict[str, Any], function: str, place: str, number: int) -> tuple[Item, str | None]:
    prompt = row.get("prompt", row.get("text"))
    response = next((row[key] for key in ANSWERS if key in row), "")
    for key, value in (("prompt", prompt), ("response", response), ("task", row.get("task", ""))):
        if not isinstance(value, str) or (key == "prompt" and not value.strip()):
            what = "an empty text" if isinstance(value, str) else jsondoc.kind(value)
            raise WorkbenchError(f"{place}: expected a text in '{key}', found {what}", EXPECTED)
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise WorkbenchError(f"{place}: expected split 'train' or 'heldout', found {split!r}", EXPECTED)
    task = row.get("task") or function
    return Item(str(row.get("id", number)), str(prompt), response, function, task, "train", place), split


def _with_splits(rows: list[tuple[Item, str | None]], shown: str) -> tuple[tuple[Item, ...], list[str]]:
    """Return the items with their splits, and warnings."""
    named = [split for _, split in rows]
    if any(named) and not all(named):
        place = next(item.place for item, split in rows if split is None)
        raise WorkbenchError(f"{place}: the row has no 'split', but other rows have one", "Give every row a split, or none.")
    by_task: dict[str, list[str]] = {}
    for item, _ in rows:
        tasks = by_task.setdefault(item.function, [])
        if item.task not in tasks:
            tasks.append(item.task)
    warnings = [
        f"function '{name}' has one task ('{tasks[0]}'): its neurons cannot be told apart from those of the task's wording"
        for name, tasks in by_task.items()
        if len(tasks) < 2
    ]
    if all(named):
        items = tuple(replace(item, split="train" if split == "train" else "heldout") for item, split in rows)
        for name in by_task:
            for split in SPLITS:
                if (count := sum(i.function == name and i.split == split for i in items)) < FEWEST:
                    raise WorkbenchError(
                        f"{shown}: function '{name}' has {count} items in split '{split}', expected at least {FEWEST}", None
                    )
        return items, warnings
    order: Counter[str] = Counter()
    items_list = []
    for item, _ in rows:
        tasks = by_task[item.function]
        number = tasks.index(item.task) if len(tasks) > 1 else order[item.function]
        order[item.function] += 1
        items_list.append(replace(item, split=SPLITS[number % 2]))
    return tuple(items_list), warnings


def item_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, longest: int, *, chat: bool = False) -> list[ItemRow]:
    """Tokenize items; a prompt and its response are tokenized together, with a space between them if neither has one.

    Args:
        items: The items.
        tokenizer: The model's tokenizer.
        longest: Largest number of tokens. Longer rows lose their end.
        chat: Put the prompt into the tokenizer's chat template.

    Raises:
        WorkbenchError: If a prompt has no tokens, or if `chat` is set and the tokenizer has no chat template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template", "Leave out --chat.")
    rows = []
    for item in items:
        prompt = item.prompt
        if chat:
            prompt = str(
                tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
            )
        if item.response:
            pair = encode_pair(tokenizer, prompt, item.response if chat else joined(prompt, item.response))
            row = ItemRow(pair.tokens[:longest], min(len(pair.prompt), longest))
        else:
            tokens = encode_text(tokenizer, prompt)[:longest]
            row = ItemRow(tokens, len(tokens))
        if not row.prompt:
            raise WorkbenchError(f"{item.place}: the prompt has no tokens in the model's vocabulary", "Remove the line.")
        rows.append(row)
    return rows

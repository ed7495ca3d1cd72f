"""What every skill generator shares: the split by content, templates, answer positions and files.

A skill is a list of prompt templates and two lists of contents (test and training). A content is what
an item is about - an operand pair, a word, a date, a message, a command - and its key alone decides on
which side of the split it falls, so that the same content never stands in both under two wordings.

Every choice is drawn from a SHA-256 of a name, never from a random generator: the files are the same
bytes on every Python version and machine. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PER_TEMPLATE = 10
TRAIN_ROWS = 2400

# Every skill has two templates for each of these first words, so that a first word says nothing about
# the skill that is asked for.
OPENINGS = (
    "Please", "Question:", "Task:", "Here", "Answer", "Given",
    "Exercise:", "Can", "What", "Now", "Read", "Work",
)  # fmt: skip


@dataclass(frozen=True)
class Content:
    """One thing to ask about: `fields` fill a template, `wrong` holds at least three near misses."""

    key: str
    fields: dict[str, str]
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """A generator: templates, the contents on each side of the split, and the templates kept for the test."""

    name: str
    templates: tuple[str, ...]
    test: Callable[[], list[Content]]
    train: Callable[[], list[Content]]
    held_out: frozenset[int] = field(default_factory=frozenset)


def draw(*parts: object) -> int:
    """A 64-bit number that depends on `parts` alone."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def pick(options: Sequence[T], *parts: object) -> T:
    """One of `options`, decided by `parts`."""
    return options[draw(*parts) % len(options)]


def shuffled(items: Iterable[T], *parts: object) -> list[T]:
    """The items in an order decided by `parts` and by their text."""
    return sorted(items, key=lambda item: draw(*parts, item))


def in_test(namespace: str, key: str, share: float) -> bool:
    """Whether the content `key` belongs to the test side; `share` is the expected part of contents there."""
    return draw("split", namespace, key) < share * 2**64


def place(answer: str, wrong: Sequence[str], gold: int, *parts: object) -> list[str]:
    """Four distinct choices with the answer at position `gold`; near misses keep their order of preference."""
    others = [text for text in dict.fromkeys(wrong) if text != answer][:3]
    if len(others) < 3:
        raise ValueError(f"{parts}: fewer than three wrong choices beside {answer!r}: {wrong!r}")
    others = shuffled(others, "choice", *parts)
    return [*others[:gold], answer, *others[gold:]]


def test_rows(skill: Skill) -> list[dict[str, object]]:
    """The test items: PER_TEMPLATE for each template, every content once, gold positions in equal numbers."""
    count = PER_TEMPLATE * len(skill.templates)
    contents = skill.test()[:count]
    if len(contents) < count:
        raise ValueError(f"{skill.name}: {len(contents)} test contents for {count} items")
    rows: list[dict[str, object]] = []
    golds = [position % 4 for position in range(count)]
    order = shuffled(range(count), skill.name, "gold")
    for index, content in enumerate(contents):
        template = index % len(skill.templates)
        gold = golds[order[index]]
        rows.append(
            {
                "id": f"{skill.name}-{index:05d}",
                "cluster": f"t{template + 1:02d}",
                "prompt": skill.templates[template].format(**content.fields),
                "answer": content.answer,
                "choices": place(content.answer, content.wrong, gold, skill.name, content.key),
                "gold": gold,
            }
        )
    return rows


def train_rows(skill: Skill) -> list[dict[str, object]]:
    """TRAIN_ROWS training rows over the templates that are not held out, in a fixed mixed order."""
    contents = skill.train()
    templates = [index for index in range(len(skill.templates)) if index not in skill.held_out]
    rows: dict[str, dict[str, object]] = {}
    for turn in range(4 * TRAIN_ROWS):
        content = contents[turn % len(contents)]
        # A content that comes round again meets another template.
        template = templates[(turn + turn // len(contents)) % len(templates)]
        prompt = skill.templates[template].format(**content.fields)
        rows.setdefault(prompt, {"prompt": prompt, "completion": content.answer})
        if len(rows) == TRAIN_ROWS:
            break
    if len(rows) < TRAIN_ROWS:
        raise ValueError(f"{skill.name}: only {len(rows)} different training prompts")
    return [rows[prompt] for prompt in shuffled(rows, skill.name, "train")]


def encode(rows: Iterable[dict[str, object]]) -> bytes:
    """The rows as JSON lines, UTF-8, keys in their own order."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def sync(files: dict[Path, bytes], *, check: bool) -> list[Path]:
    """Write the files whose bytes differ (or, with `check`, write nothing) and return their paths."""
    stale = [path for path, data in files.items() if not path.is_file() or path.read_bytes() != data]
    if not check:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])
    return stale

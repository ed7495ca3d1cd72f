"""Read YAML text into plain data with the place of every key: bounded in size and depth, numbers as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer

from workbench.errors import WorkbenchError

KeyPath = tuple[str | int, ...]
Mark = tuple[int, int]

MAX_DEPTH = 40
MAX_VALUES = 100_000
# Up to this length the parser written in Python reads a damaged text again, because its messages say more.
_EXPLAINED = 16_000
_TAG = "tag:yaml.org,2002:"
_STRING, _INT, _FLOAT, _DATE = f"{_TAG}str", f"{_TAG}int", f"{_TAG}float", f"{_TAG}timestamp"
# Decimal numbers as YAML 1.2 reads them, and those among them that YAML 1.1 reads as floats; 1e-3, 1.5e3 and -.5 it reads as text.
NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_OLD_NUMBER = re.compile(r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?")
_WHOLE = re.compile(r"[-+]?[0-9_]+")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
# Characters that no text of ours has a use for, and that paths, terminals and encodings fail on.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


@dataclass
class Tree:
    """What a YAML text holds.

    Attributes:
        data: Plain Python data.
        marks: Key path -> (line, column), counted from 1. A mapping's entry is marked at its key.
        texts: Key path -> source text of the numbers that YAML 1.1 reads as text, such as 1e-3.
    """

    data: Any = None
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)


def read_tree(text: str, shown: str) -> Tree:
    """Parse one YAML document.

    Args:
        text: The document.
        shown: How errors call it: the file's name.

    Raises:
        WorkbenchError: The text is not YAML, holds several documents, duplicate keys, more than 100,000 values or 40 levels, a
            number in base 8 or 60, or a character that cannot be stored. The message names line and column.
    """
    try:
        return _read(text, shown)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1}:{mark.column + 1}" if mark else shown
        problem = error.problem or error.context or ""
        if "maximum nesting depth" in problem:
            raise WorkbenchError(f"{where} nested too deeply", None, 2) from None
        raise WorkbenchError(f"{where} not valid YAML: {problem}", None, 2) from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # The constructors of explicit tags (!!int x, !!timestamp y, !!binary z) raise whatever Python raises.
        raise WorkbenchError(f"{shown}: not valid YAML: {error}", None, 2) from None
    except RecursionError:
        raise WorkbenchError(f"{shown}: nested too deeply", None, 2) from None


def top_scalars(text: str) -> dict[str, str]:
    """Return the scalars at the top level of a foreign mapping as they are written, nulls left out; {} where it is no YAML."""
    loader = _loader(text, "")
    try:
        node = loader.get_single_node()
    except (yaml.YAMLError, ValueError, RecursionError, WorkbenchError):
        return {}
    finally:
        loader.dispose()
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return {
        str(key.value): str(value.value)
        for key, value in pairs
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode) and value.tag != f"{_TAG}null"
    }


def _read(text: str, shown: str) -> Tree:
    loader = _loader(text, shown)
    try:
        try:
            node = loader.get_single_node()
        except (yaml.YAMLError, ValueError) as error:
            if len(text) > _EXPLAINED or isinstance(loader, _Plain) or "maximum nesting depth" in str(error):
                raise
            loader.dispose()
            loader = _Plain(text, shown)
            node = loader.get_single_node()
        tree = Tree()
        if node is not None:
            _walk(node, (), tree, shown)
            tree.data = loader.construct_document(node)
        return tree
    finally:
        loader.dispose()


class _Bounded(Composer):
    """Builds nodes, and stops at the first one too many: the rest of a long list is not even parsed."""

    shown: str
    _count = 0
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Build one node with what it holds. Raises WorkbenchError where there are too many, or too deep ones."""
        self._count += 1
        self._depth += 1
        if self._count > MAX_VALUES or self._depth > MAX_DEPTH + 1:
            mark = self.peek_event().start_mark  # type: ignore[attr-defined]
            raise _too_much(f"{self.shown}:{mark.line + 1}:{mark.column + 1}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Build a scalar; one with an explicit tag (!!str 1e-3) is marked as if it stood in quotes."""
        tagged = self.peek_event().tag not in (None, "!")  # type: ignore[attr-defined]
        node = super().compose_scalar_node(anchor)
        if tagged:
            node.style = node.style or "tag"
        return node


class _Plain(_Bounded, yaml.SafeLoader):
    """The parser in Python."""

    def __init__(self, text: str, shown: str) -> None:
        yaml.SafeLoader.__init__(self, text)
        self.shown = shown


def _loader(text: str, shown: str) -> Any:
    """Return the parser of libyaml, ten times as fast as the one in Python, where PyYAML has it."""
    if not yaml.__with_libyaml__:
        return _Plain(text, shown)
    from yaml.cyaml import CParser  # type: ignore[attr-defined]

    class Fast(_Bounded, CParser, yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
        def __init__(self) -> None:
            CParser.__init__(self, text)
            for part in (Composer, yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
                part.__init__(self)
            self.shown = shown

    return Fast()


def _too_much(where: str) -> WorkbenchError:
    return WorkbenchError(
        f"{where} nested too deeply, or too many aliases or values (up to {MAX_DEPTH} levels and {MAX_VALUES:,} values)", None, 2
    )


def _walk(node: yaml.Node, path: KeyPath, tree: Tree, shown: str) -> None:
    """Record marks and settle how plain scalars read; refuse aliases' blow-ups, merge keys, duplicates and depth."""
    marks = tree.marks
    marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    if len(path) > MAX_DEPTH or len(marks) > MAX_VALUES:
        raise _too_much(_place(node, shown))
    if isinstance(node, yaml.MappingNode):
        for key, key_node, value in _entries(node, shown):
            mark = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if (*path, key) in marks:
                first = marks[(*path, key)]
                raise WorkbenchError(
                    f"{shown}:{mark[0]}:{mark[1]} duplicate key '{key}' (first at line {first[0]})",
                    "Keep one of the two; YAML would silently take the last.",
                    2,
                )
            marks[(*path, key)] = mark
            _walk(value, (*path, key), tree, shown)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*path, i), tree, shown)
    elif isinstance(node, yaml.ScalarNode):
        _settle(node, path, tree, shown)


def _settle(node: yaml.ScalarNode, path: KeyPath, tree: Tree, shown: str) -> None:
    """Decide what a scalar is. Raises WorkbenchError for a number that people and YAML 1.1 read differently."""
    text = str(node.value)
    _check_characters(node, shown)
    if node.style:  # quoted, or a block
        return
    if node.tag == _DATE:
        node.tag = _STRING  # no field is a date
    elif node.tag == _INT and _OCTAL.fullmatch(text):
        sign, digits = ("-" if text.startswith("-") else ""), text.replace("_", "").lstrip("+-0")
        raise _other_base(node, shown, "octal", f"{sign}{digits}" if digits else "0")
    elif node.tag in (_INT, _FLOAT) and ":" in text:
        raise _other_base(node, shown, "base 60", _integer(text))
    elif node.tag == _STRING and NUMBER.fullmatch(text) and not _WHOLE.fullmatch(text):
        node.tag = _FLOAT
    if node.tag == _FLOAT and NUMBER.fullmatch(text):
        if not math.isfinite(float(text.replace("_", ""))):
            raise WorkbenchError(
                f"{_place(node, shown)} {text} is beyond the largest number that a float holds (1.8e308)",
                f'Write a smaller number, or "{text}" in quotes where it is a text.',
                2,
            )
        if not _OLD_NUMBER.fullmatch(text):
            tree.texts[path] = text


def _other_base(node: yaml.ScalarNode, shown: str, base: str, meant: str) -> WorkbenchError:
    """Return a number such as 010 or 1:30, with what to type instead."""
    return WorkbenchError(
        f"{_place(node, shown)} YAML reads {node.value} as {_integer(node.value)} ({base})",
        f'Write {meant} for the number {meant}, or "{node.value}" in quotes where it is a text.',
        2,
    )


def _integer(text: str) -> str:
    """Return the value that YAML 1.1 gives a number in base 8 or 60."""
    sign, digits = ("-" if text.startswith("-") else ""), text.lstrip("+-").replace("_", "")
    if ":" in digits:
        value = 0.0
        for part in digits.split(":"):
            value = value * 60 + float(part)
        return f"{sign}{value:g}"
    return f"{sign}{int(digits, 8)}"


def _entries(node: yaml.MappingNode, shown: str) -> Iterator[tuple[str | int, yaml.Node, yaml.Node]]:
    for key_node, value in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == f"{_TAG}merge":
            raise WorkbenchError(f"{_place(key_node, shown)} keys must be plain words", None, 2)
        _check_characters(key_node, shown)
        if key_node.tag == _DATE and not key_node.style:
            key_node.tag = _STRING
        is_int = key_node.tag == _INT
        if key_node.tag not in (_STRING, _INT) or (is_int and not re.fullmatch("0|[1-9][0-9]*", key_node.value)):
            kind = key_node.tag.removeprefix(_TAG)
            raise WorkbenchError(
                f"{_place(key_node, shown)} YAML reads the key {key_node.value} as {kind}, expected text",
                f'Put it in quotes: "{key_node.value}".',
                2,
            )
        yield (int(key_node.value) if is_int else str(key_node.value)), key_node, value


def _check_characters(node: yaml.Node, shown: str) -> None:
    found = _UNUSABLE.search(node.value)
    if found:
        raise WorkbenchError(
            f"{_place(node, shown)} holds the character U+{ord(found[0]):04X}, which no text here can have", "Take it out.", 2
        )


def _place(node: yaml.Node, shown: str) -> str:
    return f"{shown}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

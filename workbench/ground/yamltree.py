"""Read YAML into plain data with the position of every key; size and depth are limited, and numbers are read as in YAML 1.2."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer

from workbench.ground.errors import InvalidRecipeError, WorkbenchError, shell

KeyPath = tuple[str | int, ...]
Mark = tuple[int, int]

MAX_DEPTH = 40
MAX_VALUES = 100_000
# Up to this length an invalid text is parsed again by the parser written in Python, which has better messages.
_EXPLAINED = 16_000
_TAG = "tag:yaml.org,2002:"
_STRING, _INT, _FLOAT, _DATE = f"{_TAG}str", f"{_TAG}int", f"{_TAG}float", f"{_TAG}timestamp"
# Decimal numbers of YAML 1.2, and those of them that YAML 1.1 reads as floats. YAML 1.1 reads 1e-3, 1.5e3 and -.5 as texts.
NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_OLD_NUMBER = re.compile(r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?")
_WHOLE = re.compile(r"[-+]?[0-9_]+")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
# Characters that no document needs and that break paths, terminals and encodings.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


@dataclass
class Tree:
    """The content of a YAML text.

    Attributes:
        data: Plain Python data.
        marks: Key path -> (line, column), counted from 1. The mark of a mapping's entry is the position of its key.
        texts: Key path -> source text of the numbers that YAML 1.1 reads as text, such as 1e-3.
    """

    data: Any = None
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)


def read_tree(text: str, label: str) -> Tree:
    """Parse one YAML document.

    Args:
        text: The document.
        label: The document's name in messages, such as a file name.

    Raises:
        WorkbenchError: If the text is not YAML, or has several documents, duplicate keys, more than 100,000 values or 40 levels, a
            number in base 8 or 60, or a character that cannot be stored. The message names line and column.
    """
    try:
        return _read(text, label)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
        problem = error.problem or error.context or ""
        if "maximum nesting depth" in problem:
            raise InvalidRecipeError(f"{where} nested too deeply") from None
        tabs = "\\t" in problem
        hint = f"YAML is indented with spaces. Replace the tabs: `sed -i 's/\\t/  /g' {shell(label)}`" if tabs else None
        raise InvalidRecipeError(f"{where} not valid YAML: {problem}", hint) from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # The constructors of explicit tags (!!int x, !!timestamp y, !!binary z) raise the exceptions of Python's own functions.
        raise InvalidRecipeError(f"{label}: not valid YAML: {error}") from None
    except RecursionError:
        raise InvalidRecipeError(f"{label}: nested too deeply") from None


def top_scalars(text: str) -> dict[str, str]:
    """Return the top-level scalars of an untrusted mapping as written, without nulls; {} if the text is not YAML."""
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


def _read(text: str, label: str) -> Tree:
    loader = _loader(text, label)
    try:
        try:
            node = loader.get_single_node()
        except (yaml.YAMLError, ValueError) as error:
            if len(text) > _EXPLAINED or isinstance(loader, _Plain) or "maximum nesting depth" in str(error):
                raise
            loader.dispose()
            loader = _Plain(text, label)
            node = loader.get_single_node()
        tree = Tree()
        if node is not None:
            _walk(node, (), tree, label)
            tree.data = loader.construct_document(node)
        return tree
    finally:
        loader.dispose()


class _Bounded(Composer):
    """Builds nodes up to the limits of size and depth, and does not parse the rest."""

    label: str
    _count = 0
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Build one node with its children.

        Raises:
            WorkbenchError: If there are too many nodes or levels.
        """
        self._count += 1
        self._depth += 1
        if self._count > MAX_VALUES or self._depth > MAX_DEPTH + 1:
            mark = self.peek_event().start_mark  # type: ignore[attr-defined]
            raise _too_much(f"{self.label}:{mark.line + 1}:{mark.column + 1}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Build a scalar; one with an explicit tag (!!str 1e-3) is marked as if it were quoted."""
        tagged = self.peek_event().tag not in (None, "!")  # type: ignore[attr-defined]
        node = super().compose_scalar_node(anchor)
        if tagged:
            node.style = node.style or "tag"
        return node


class _Plain(_Bounded, yaml.SafeLoader):
    """The parser written in Python."""

    def __init__(self, text: str, label: str) -> None:
        yaml.SafeLoader.__init__(self, text)
        self.label = label


def _loader(text: str, label: str) -> Any:
    """Return libyaml's parser if PyYAML has it, which is ten times as fast as the parser in Python."""
    if not yaml.__with_libyaml__:
        return _Plain(text, label)
    from yaml.cyaml import CParser  # type: ignore[attr-defined]

    class Fast(_Bounded, CParser, yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
        def __init__(self) -> None:
            CParser.__init__(self, text)
            for part in (Composer, yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
                part.__init__(self)
            self.label = label

    return Fast()


def _too_much(where: str) -> WorkbenchError:
    return InvalidRecipeError(
        f"{where} nested too deeply, or too many aliases or values (at most {MAX_DEPTH} levels and {MAX_VALUES:,} values)",
    )


def _walk(node: yaml.Node, path: KeyPath, tree: Tree, label: str) -> None:
    """Record the positions of all keys, resolve plain scalars, and refuse duplicate keys, merge keys and oversized documents."""
    marks = tree.marks
    marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    if len(path) > MAX_DEPTH or len(marks) > MAX_VALUES:
        raise _too_much(_place(node, label))
    if isinstance(node, yaml.MappingNode):
        for key, key_node, value in _entries(node, label):
            mark = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if (*path, key) in marks:
                first = marks[(*path, key)]
                raise InvalidRecipeError(
                    f"{label}:{mark[0]}:{mark[1]} duplicate key '{key}' (first at line {first[0]})",
                    "Keep one of the two. YAML would silently use the last one.",
                )
            marks[(*path, key)] = mark
            _walk(value, (*path, key), tree, label)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*path, i), tree, label)
    elif isinstance(node, yaml.ScalarNode):
        _settle(node, path, tree, label)


def _settle(node: yaml.ScalarNode, path: KeyPath, tree: Tree, label: str) -> None:
    """Set the type of a plain scalar; raise an error for a number in base 8 or 60, which readers would misread."""
    text = str(node.value)
    _check_characters(node, label)
    if node.style:  # quoted or a block scalar
        return
    if node.tag == _DATE:
        node.tag = _STRING  # no field is a date
    elif node.tag == _INT and _OCTAL.fullmatch(text):
        sign, digits = ("-" if text.startswith("-") else ""), text.replace("_", "").lstrip("+-0")
        raise _other_base(node, label, "octal", f"{sign}{digits}" if digits else "0")
    elif node.tag in (_INT, _FLOAT) and ":" in text:
        raise _other_base(node, label, "base 60", _integer(text))
    elif node.tag == _STRING and NUMBER.fullmatch(text) and not _WHOLE.fullmatch(text):
        node.tag = _FLOAT
    if node.tag == _FLOAT and NUMBER.fullmatch(text):
        if not math.isfinite(float(text.replace("_", ""))):
            raise InvalidRecipeError(
                f"{_place(node, label)} {text} is beyond the largest number that a float holds (1.8e308)",
                f'Write a smaller number, or put "{text}" in quotes if it is a text.',
            )
        if not _OLD_NUMBER.fullmatch(text):
            tree.texts[path] = text


def _other_base(node: yaml.ScalarNode, label: str, base: str, intended: str) -> WorkbenchError:
    """Return the error for a number such as 010 or 1:30, with a hint that says what to type instead."""
    return InvalidRecipeError(
        f"{_place(node, label)} YAML reads {node.value} as {_integer(node.value)} ({base})",
        f'Write {intended} for the number {intended}, or put "{node.value}" in quotes if it is a text.',
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


def _entries(node: yaml.MappingNode, label: str) -> Iterator[tuple[str | int, yaml.Node, yaml.Node]]:
    for key_node, value in node.value:
        if key_node.tag == f"{_TAG}merge":
            raise InvalidRecipeError(f"{_place(key_node, label)} merge keys (<<) are not read", "Write the fields themselves.")
        if not isinstance(key_node, yaml.ScalarNode):
            raise InvalidRecipeError(f"{_place(key_node, label)} keys must be plain words")
        _check_characters(key_node, label)
        if (key_node.tag == _DATE or key_node.value == "on") and not key_node.style:
            key_node.tag = _STRING  # YAML 1.1 reads the key `on` as true, and recipes have a field of this name
        is_int = key_node.tag == _INT
        if key_node.tag not in (_STRING, _INT) or (is_int and not re.fullmatch("0|[1-9][0-9]*", key_node.value)):
            kind = key_node.tag.removeprefix(_TAG)
            raise InvalidRecipeError(
                f"{_place(key_node, label)} YAML reads the key {key_node.value} as {kind}, expected text",
                f'Put it in quotes: "{key_node.value}".',
            )
        yield (int(key_node.value) if is_int else str(key_node.value)), key_node, value


def _check_characters(node: yaml.Node, label: str) -> None:
    unusable = _UNUSABLE.search(node.value)
    if unusable:
        raise InvalidRecipeError(
            f"{_place(node, label)} the character U+{ord(unusable[0]):04X} is not allowed", "Remove the character."
        )


def _place(node: yaml.Node, label: str) -> str:
    return f"{label}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

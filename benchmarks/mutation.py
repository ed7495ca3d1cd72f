"""Mutants of a source file: mutmut's operators, and three of our own for what those leave alone."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_assignment, operator_string

# What is said in them is tested as text, or checks nothing in a right program.
SKIPPED = (cst.Annotation, cst.Raise, cst.Assert, cst.Decorator, cst.Import, cst.ImportFrom, cst.Global, cst.Nonlocal)
WORDED = {"__repr__", "__str__", "__rich__", "_repr_html_"}
"""Functions that only say something."""
TELLING = {
    "warn",
    "warning",
    "info",
    "debug",
    "log",
    "print",
    "note",
    "emit",
    "error",
    "reworded",
    "cast",
    "TypeVar",
    "ParamSpec",
}
"""Calls that say something, and those for type checkers."""
KEYWORDS = {"strict", "encoding", "description", "title", "hint", "stacklevel"}
"""Arguments that guard, say something, or name the default of our systems."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: The file, relative to the checkout.
        lines: First and last line of the statement, or of the head of the block, that holds the change.
        once: Whether the line runs when the module is imported.
        old, new: The lines that differ, before and after.
        source: The whole file after the change.
    """

    path: str
    lines: tuple[int, int]
    once: bool
    old: str
    new: str
    source: str

    @property
    def name(self) -> tuple[str, str, str]:
        """Return the mutant's name where line numbers do not matter."""
        return self.path, self.old, self.new


@dataclass(frozen=True)
class Change:
    """A node of a module and what takes its place; `make` writes the file."""

    path: str
    module: Any
    node: Any
    other: Any
    lines: tuple[int, int]
    once: bool

    def holds(self, path: str, old: str) -> bool:
        """Return whether the change may be in the file and the lines of a mutant: a quick look before `make`."""
        first, last = self.lines
        text = self.module.code if path == self.path else ""
        return any(line.strip() == old.partition("\n")[0] for line in text.splitlines()[first - 1 : last])

    def make(self) -> Mutant | None:
        """Return the mutant, or None where the text stays the same or is no Python."""
        before = self.module.code
        after = self.module.deep_replace(self.node, self.other).code
        try:
            compile(after, self.path, "exec")
        except (SyntaxError, ValueError):
            return None
        rows = [row for row in difflib.ndiff(before.splitlines(), after.splitlines()) if row[:2] in ("- ", "+ ")]
        old, new = ("\n".join(row[2:].strip() for row in rows if row[0] == sign) for sign in "-+")
        return Mutant(self.path, self.lines, self.once, old, new, after) if old != new else None


def changes(path: Path, name: str) -> list[Change]:
    """Return every change of a file that is worth a mutant."""
    wrapper = MetadataWrapper(cst.parse_module(path.read_text("utf-8")), unsafe_skip_copy=True)
    places = wrapper.resolve(PositionProvider)
    found: list[Change] = []

    def visit(node: Any, lines: tuple[int, int], once: bool) -> None:
        if _skipped(node):
            return
        if isinstance(node, cst.SimpleStatementLine):
            lines = places[node].start.line, places[node].end.line
        elif isinstance(node, cst.BaseCompoundStatement):
            first = places[node].start.line
            inner = node.cases[0] if isinstance(node, cst.Match) else node.body
            lines = first, max(first, places[inner].start.line - 1)
        for other in others(node, once):
            found.append(Change(name, wrapper.module, node, other, lines, once))
        inside = once and not isinstance(node, (cst.FunctionDef, cst.Lambda))
        for child in node.children:
            visit(child, lines, inside or (once and isinstance(child, cst.Parameters)))

    visit(wrapper.module, (1, 1), True)
    return found


def others(node: Any, once: bool) -> Iterator[Any]:
    """Yield what may take a node's place."""
    for kind, operator in mutation_operators:
        if not isinstance(node, kind) or (once and operator is operator_assignment):  # a name that is None breaks the import
            continue
        made = list(operator(node))
        if operator is operator_string:
            made = made[:1]  # a word in capitals is no other mistake than another word
        yield from (other for other in made if not (isinstance(node, cst.Call) and _only_guards(node, other)))
    yield from OWN.get(type(node), _none)(node)


def _none(node: Any) -> Iterable[Any]:
    return ()


def _negated(node: Any) -> Iterable[Any]:
    """The opposite condition, where mutmut's operators do not give it."""
    test = node.test
    plain = isinstance(test, cst.UnaryOperation) or (isinstance(test, cst.Comparison) and len(test.comparisons) == 1)
    if not plain and "TYPE_CHECKING" not in cst.Module([]).code_for_node(test):
        inner = test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()]) if hasattr(test, "lpar") else test
        opposite = cst.UnaryOperation(cst.Not(), inner, lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=opposite)


def _returns_none(node: Any) -> Iterable[Any]:
    if node.value is not None and not (isinstance(node.value, cst.Name) and node.value.value in ("None", "False")):
        yield node.with_changes(value=cst.Name("None"), whitespace_after_return=cst.SimpleWhitespace(" "))


def _left_out(node: Any) -> Iterable[Any]:
    """`pass` instead of a call whose value nobody reads."""
    if isinstance(node.value, (cst.Call, cst.Await)):
        yield cst.Pass()


OWN: dict[type, Callable[[Any], Iterable[Any]]] = {
    cst.If: _negated,
    cst.While: _negated,
    cst.CompIf: _negated,
    cst.Return: _returns_none,
    cst.Expr: _left_out,
}


def _called(node: Any) -> str:
    function = node.func
    return str(function.attr.value if isinstance(function, cst.Attribute) else getattr(function, "value", ""))


def _skipped(node: Any) -> bool:
    """Return True if neither a node nor what it holds is changed."""
    if isinstance(node, SKIPPED):
        return True
    if isinstance(node, cst.FunctionDef):
        return node.name.value in WORDED
    if isinstance(node, cst.If):
        return "TYPE_CHECKING" in cst.Module([]).code_for_node(node.test)
    if isinstance(node, cst.Call):
        return _called(node) in TELLING or _called(node).endswith(("Error", "Warning")) or _called(node) in {"len", "isinstance"}
    if isinstance(node, cst.Arg):
        return node.keyword is not None and node.keyword.value in KEYWORDS
    if isinstance(node, (cst.SimpleString, cst.FormattedString, cst.ConcatenatedString)):
        return _words(node)
    if isinstance(node, cst.Expr):  # docstrings, and the texts under fields
        return isinstance(node.value, (cst.SimpleString, cst.ConcatenatedString))
    if isinstance(node, cst.Assign):
        target = node.targets[0].target
        return isinstance(target, cst.Name) and (target.value in {"__all__", "paper", "formula"} or _is_alias(node.value))
    return False


def _is_alias(value: Any) -> bool:
    """Return True if a value is a type: `Literal[...]`, `Annotated[...]`, `A | B` of names with capitals."""
    if isinstance(value, cst.Subscript):
        return _is_alias(value.value) or getattr(value.value, "value", "") in {
            "tuple",
            "list",
            "dict",
            "type",
            "set",
            "frozenset",
        }
    if isinstance(value, cst.BinaryOperation):
        return isinstance(value.operator, cst.BitOr) and (_is_alias(value.left) or _is_alias(value.right))
    return isinstance(value, cst.Name) and value.value in {
        "Literal",
        "Annotated",
        "Callable",
        "Union",
        "Mapping",
        "Sequence",
        "Iterable",
    }


def _words(node: Any) -> bool:
    """Return True if a text has more than one word: it is for people."""
    text = cst.Module([]).code_for_node(node)
    if isinstance(node, cst.FormattedString):
        text = "".join(part.value for part in node.parts if isinstance(part, cst.FormattedStringText))
    return " " in text.strip() or text.startswith(('"""', 'r"""')) or text.strip("\"'").lower() == "utf-8"


def _only_guards(node: Any, other: Any) -> bool:
    """Return True if a mutated call lacks, or has another value of, an argument that only guards or says something."""
    left = {id(argument) for argument in other.args} if isinstance(other, cst.Call) else set()
    gone = [argument for argument in node.args if id(argument) not in left]
    return bool(gone) and all(_skipped(argument) or _skipped(argument.value) for argument in gone)

"""The house as a list: how long a file and a function may be, how many parameters a function may have, and how large the whole may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module

import pytest

from worlds.places import PROJECT

from workbench.ground.parts import FILE, parts

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 80, 7
FOLDERS = ("workbench", "tests", "docs", "evals", "benchmarks")
# Where a parameter is an option of a command, or a fixture, a case or a default of a test world.
WITH_OPTIONS = ("workbench/cli/", *(f"workbench/{part}/commands" for part in parts()), "tests/")
# Other functions that may have more parameters, and why.
MORE_PARAMETERS = {
    "workbench/weights/sparse.py:_select_compiled": "hands each argument of `select` to a compiled kernel, once a block of rows",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> Iterator[tuple[str, str]]:
    """Yield (path within the checkout, text) of every Python file."""
    for folder in FOLDERS:
        for path in sorted((PROJECT / folder).rglob("*.py")):
            yield path.relative_to(PROJECT).as_posix(), path.read_text("utf-8")


@cache
def functions_of(text: str) -> list[tuple[Function, bool]]:
    """Return every function of a file, and whether its first parameter is `self` or `cls`."""
    return list(functions(ast.parse(text)))


def functions(node: ast.AST, owner: ast.AST | None = None) -> Iterator[tuple[Function, bool]]:
    """Yield every function below a node, and whether its first parameter is `self` or `cls`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            static = any(ast.unparse(decorator) == "staticmethod" for decorator in child.decorator_list)
            yield child, isinstance(owner, ast.ClassDef) and not static
        inner = child if isinstance(child, (Function, ast.ClassDef)) else owner
        yield from functions(child, inner)


def parameters(function: Function, bound: bool) -> int:
    """Return the number of parameters of a function, without `self` and `cls`; `*args` and `**kwargs` count as one each."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) - bound + sum(rest is not None for rest in (given.vararg, given.kwarg))


def too_long(name: str, text: str) -> list[str]:
    """Return a line for a file, and for each function in it, that is too long."""
    lines = len(text.splitlines())
    offenders = [f"{name} has {lines} lines, at most {MAX_FILE}"] if lines > MAX_FILE else []
    for function, _ in functions_of(text):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION:
            offenders.append(f"{name}:{function.lineno}: {function.name} has {length} lines, at most {MAX_FUNCTION}")
    return offenders


def too_many(name: str, text: str) -> dict[str, str]:
    """Return file and name of each function with too many parameters, and a line on it."""
    if name.startswith(WITH_OPTIONS):
        return {}
    return {
        f"{name}:{function.name}": f"{name}:{function.lineno}: {function.name} has {count} parameters, at most {MAX_PARAMETERS}"
        for function, bound in functions_of(text)
        if (count := parameters(function, bound)) > MAX_PARAMETERS
    }


def test_files_and_functions_are_short() -> None:
    offenders = [line for name, text in sources() for line in too_long(name, text)]
    assert not offenders, "\n".join(offenders)


def test_functions_have_few_parameters() -> None:
    found = {key: line for name, text in sources() for key, line in too_many(name, text).items()}
    offenders = [line for key, line in found.items() if key not in MORE_PARAMETERS]
    offenders += [f"{key} is no exception any more: remove its line" for key in MORE_PARAMETERS if key not in found]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("def f(a, b, c, d, e, f, g): ...", False),
        ("def f(a, b, c, d, e, f, g, h): ...", True),
        ("def f(a, /, b, c, *, d, e, f, g, h): ...", True),
        ("def f(a, b, c, d, e, f, *g, **h): ...", True),
        ("async def f(a, b, c, d, e, f, g, h): ...", True),
        ("class A:\n    def f(self, a, b, c, d, e, f, g): ...", False),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...", True),
        ("class A:\n    @classmethod\n    def f(cls, a, b, c, d, e, f, g): ...", False),
        ("class A:\n    @staticmethod\n    def f(a, b, c, d, e, f, g, h): ...", True),
        ("class A:\n    if True:\n        def f(self, a, b, c, d, e, f, g): ...", False),
        ("class A:\n    def g(self):\n        def f(a, b, c, d, e, f, g, h): ...", True),
    ],
)
def test_a_function_with_too_many_parameters_is_named(text: str, named: bool) -> None:
    assert list(too_many("workbench/a.py", text)) == (["workbench/a.py:f"] if named else [])
    assert not too_many("workbench/cli/a.py", text)


def test_a_long_file_and_a_long_function_are_named() -> None:
    text = "class A:\n    def f(self):\n" + "        pass\n" * MAX_FUNCTION
    assert too_long("a.py", text) == [f"a.py:2: f has {MAX_FUNCTION + 1} lines, at most {MAX_FUNCTION}"]
    assert too_long("a.py", text.replace("        pass\n", "", 1)) == []
    assert too_long("a.py", "x = 1\n" * (MAX_FILE + 1)) == [f"a.py has {MAX_FILE + 1} lines, at most {MAX_FILE}"]
    assert too_long("a.py", "x = 1\n" * MAX_FILE) == []


# What a test may not ask: how long something took, or whether it is done within a time. `worlds/effort.py` limits CPU time.
CLOCKS = (
    "perf_counter",
    "monotonic",
    "time.time()",
    "process_time",
    ".join(1",
    "timeout=1",
    "timeout=5",
    "datetime.now",
    "date.today",
)
# A browser and a process under faults answer or are stuck; the builder of the people prints how long it worked; a server closes what a client leaves open.
WITH_CLOCKS = (
    "tests/worlds/devtools.py",
    "tests/browser/",
    "tests/fixtures/",
    "tests/worlds/effort.py",
    "tests/worlds/faults.py",
)


def test_tests_have_no_wall_clock() -> None:
    found = {
        f"{name}: {line.strip()}"
        for name, text in sources()
        if name.startswith("tests/") and not name.startswith((*WITH_CLOCKS, "tests/test_house.py"))
        for line in text.splitlines()
        if any(clock in line for clock in CLOCKS) and "monkeypatch" not in line
    }
    assert not found, "\n".join(sorted(found))


# What the core may hold, as lines, and everything as names: functions and classes. A raise of a number takes an equal removal in the same commit.
# A part may grow within the number that the docstring of its part.py states.
CORE_LINES = 85_200
CORE_NAMES = 5_930
WORDS = 101_103
SLACK = 0.98
"""A number that is less than this share of its ceiling lowers the ceiling."""


def names(text: str) -> int:
    """Return the number of functions and classes in a file."""
    return sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for node in ast.walk(ast.parse(text)))


def part_of(name: str) -> str:
    """Return the part to which a file of the package belongs; empty for the core."""
    folder = name.split("/")[1]
    return folder if (PROJECT / "workbench" / folder / FILE).is_file() else ""


def ceilings() -> Iterator[tuple[str, int, int]]:
    """Yield what is counted, its number, and its ceiling."""
    package = [(part_of(name), text) for name, text in sources() if name.startswith("workbench/")]
    yield "lines of the core", sum(len(text.splitlines()) for part, text in package if not part), CORE_LINES
    yield "names of the core", sum(names(text) for part, text in package if not part), CORE_NAMES
    for part in sorted({part for part, _ in package} - {""}):
        said = re.search(r"At most ([\d,]+) names\.", import_module(f"workbench.{part}.part").__doc__ or "")
        assert said, f"workbench/{part}/part.py: its docstring says no ceiling: At most N names."
        yield f"names of {part}", sum(names(text) for other, text in package if other == part), int(said[1].replace(",", ""))
    pages = [*(PROJECT / "docs").rglob("*.md"), *PROJECT.glob("*.md")]
    yield "words of the documentation", sum(len(page.read_text("utf-8").split()) for page in pages), WORDS


def test_nothing_grows_beyond_its_ceiling() -> None:
    offenders = []
    for what, count, most in ceilings():
        if count > most:
            offenders.append(f"{count:,} {what}, at most {most:,}: remove as much")
        elif count < SLACK * most:
            offenders.append(f"{count:,} {what}, the ceiling is {most:,}: lower it")
    assert not offenders, "\n".join(offenders)

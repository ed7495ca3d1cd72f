"""YAML that users write: every mistake is an error at its place, none a traceback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from workbench import yamldoc
from workbench.errors import WorkbenchError, nearest

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
BAD = {
    "duplicate": ("a: 1\nb: 2\na: 3", "<text>:3:1 duplicate key 'a' (first at line 1)"),
    "duplicate deep": ("a:\n  b: 1\n  b: 2", "<text>:3:3 duplicate key 'b' (first at line 2)"),
    "tab": ("a:\n\tb: 2", "<text>:2:1 not valid YAML: found character '\\t' that cannot start any token"),
    "indent": ("a:\n  b: 1\n c: 2", "<text>:3:2 not valid YAML: expected <block end>, but found '<block mapping start>'"),
    "open list": ("a: [1", "<text>:1:6 not valid YAML: expected ',' or ']', but got '<stream end>'"),
    "open quote": ("x: 'a", "<text>:1:6 not valid YAML: found unexpected end of stream"),
    "two documents": ("---\na: 1\n---\nb: 2", "<text>:3:1 not valid YAML: but found another document"),
    "unknown alias": ("a: *b", "<text>:1:4 not valid YAML: found undefined alias 'b'"),
    "alias of itself": ("a: &x [*x]", "<text>:1:4 nested too deeply, or too many aliases"),
    "alias bomb": (BOMB, "nested too deeply, or too many aliases"),
    "brackets": ("[" * 5000, "<text>: nested too deeply"),
    "merge key": ("<<: {a: 1}", "<text>:1:1 keys must be plain words"),
    "list as key": ("? [a]\n: 1", "<text>:1:3 keys must be plain words"),
    "boolean key": ("yes: 1", "<text>:1:1 YAML reads the key yes as bool, expected text"),
    "time as key": ("a: 1\n4:20: x", "<text>:2:1 YAML reads the key 4:20 as int, expected text"),
    "hexadecimal key": ("0x1F: x", "<text>:1:1 YAML reads the key 0x1F as int, expected text"),
    "impossible date": ("a: 2026-13-45", "<text>: not valid YAML: month must be in 1..12"),
    "wrong tag": ("a: !!int abc", "<text>: not valid YAML: invalid literal for int()"),
    "code": ("!!python/object/apply:os.system [ls]", "<text>:1:1 not valid YAML: could not determine a constructor for the tag"),
    "control character": ("a: \x00", "<text>: not valid YAML: unacceptable character #x0000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text(name: str) -> None:
    text, message = BAD[name]
    start = time.perf_counter()
    with pytest.raises(WorkbenchError) as caught:
        yamldoc.parse(text)
    assert message in caught.value.message
    assert caught.value.exit_code == 2
    assert time.perf_counter() - start < 5


def test_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1", "utf-8")
    with pytest.raises(WorkbenchError, match="no such file") as caught:
        yamldoc.load(tmp_path / "recipes.yaml")
    assert caught.value.hint == "Did you mean 'recipe.yaml'?"
    with pytest.raises(WorkbenchError, match="is a directory"):
        yamldoc.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(WorkbenchError, match=r"not UTF-8 text \(byte 3\)"):
        yamldoc.load(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_text("#" * (yamldoc.MAX_BYTES + 1), "utf-8")
    with pytest.raises(WorkbenchError, match="1,000,001 bytes"):
        yamldoc.load(tmp_path / "large.yaml")


def test_marks() -> None:
    document = yamldoc.parse("a: 1\nb:\n  - c: x\n    d: {e: 2}\n", "f.yaml")
    assert document.data == {"a": 1, "b": [{"c": "x", "d": {"e": 2}}]}
    assert document.at(("b", 0, "d", "e")) == "f.yaml:4:9"
    assert document.at(("b", 0)) == "f.yaml:3:5"
    assert document.at(("b", 0, "missing", 7)) == "f.yaml:3:5"
    assert document.error(("b", 0, "c"), "wrong").message == "f.yaml:3:5 b.0.c: wrong"


def test_aliases_are_values() -> None:
    assert yamldoc.parse("a: &x {b: 1}\nc: *x").data == {"a": {"b": 1}, "c": {"b": 1}}


def test_nearest() -> None:
    assert nearest("densty", ["density", "lambda"]) == "Did you mean 'density'?"
    assert nearest("x", ["b", "a"]) == "Known: a, b."
    assert nearest("x", []) == "None is known."

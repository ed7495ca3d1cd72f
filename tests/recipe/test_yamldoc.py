"""YAML that users write: every mistake is an error at its place, none a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.effort import cpu_limit

from workbench.ground import yamldoc
from workbench.ground.errors import WorkbenchError, nearest
from workbench.steps.fields import Real, Strict

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
    "brackets": ("[" * 5000, "nested too deeply"),
    "merge key": ("<<: {a: 1}", "<text>:1:1 merge keys (<<) are not read"),
    "list as key": ("? [a]\n: 1", "<text>:1:3 keys must be plain words"),
    "boolean key": ("yes: 1", "<text>:1:1 YAML reads the key yes as bool, expected text"),
    "time as key": ("a: 1\n4:20: x", "<text>:2:1 YAML reads the key 4:20 as int, expected text"),
    "hexadecimal key": ("0x1F: x", "<text>:1:1 YAML reads the key 0x1F as int, expected text"),
    "impossible date": ("a: !!timestamp 2026-13-45", "<text>: not valid YAML: month must be in 1..12"),
    "octal": ("a: 1\nb: 010", "<text>:2:4 YAML reads 010 as 8 (octal)"),
    "octal, negative": ("b: [-0_17]", "<text>:1:5 YAML reads -0_17 as -15 (octal)"),
    "octal as key": ("010: x", "<text>:1:1 YAML reads the key 010 as int, expected text"),
    "base 60": ("b: 1:30", "<text>:1:4 YAML reads 1:30 as 90 (base 60)"),
    "base 60, float": ("b: 1:30.5", "<text>:1:4 YAML reads 1:30.5 as 90.5 (base 60)"),
    "too large": ("b: 1e400", "<text>:1:4 1e400 is beyond the largest number that a float holds"),
    "NUL": ('a: "x\\0y"', "<text>:1:4 the character U+0000 is not allowed"),
    "lone surrogate": ('"a\\ud800": 1', "<text>:1:1 the character U+D800 is not allowed"),
    "long list": (f"a: [{'1,' * 440_000}1]", "too many aliases or values (at most 40 levels and 100,000 values)"),
    "long list, broken": (f"a: [{'1,' * 99_000}", "not valid YAML"),
    "tag without a value": ("a: !!timestamp x", "<text>: not valid YAML"),
    "broken binary": ("a: !!binary é", "<text>:1:4 not valid YAML"),
    "wrong tag": ("a: !!int abc", "<text>: not valid YAML: invalid literal for int()"),
    "code": ("!!python/object/apply:os.system [ls]", "<text>:1:1 not valid YAML: could not determine a constructor for the tag"),
    "control character": ("a: \x00", "<text>: not valid YAML: unacceptable character #x0000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text(name: str) -> None:
    text, message = BAD[name]
    with cpu_limit(5), pytest.raises(WorkbenchError) as caught:
        yamldoc.parse(text)
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1", "utf-8")
    with pytest.raises(WorkbenchError, match="no such file") as caught:
        yamldoc.load(tmp_path / "recipes.yaml")
    assert caught.value.hint == f"Did you mean '{tmp_path / 'recipe.yaml'}'?"
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


PLAIN = {
    "1e-3": 1e-3, "1e-1": 0.1, "1E5": 1e5, "1.5e3": 1500.0, "-1e-3": -1e-3, "+.5": 0.5, "-.5": -0.5, ".5e-2": 0.005, "5.e1": 50.0,
    "1_000": 1000, "1_000.5": 1000.5, "1_0e2": 1000.0, "0": 0, "0.5": 0.5, "-3": -3, "0x1F": 31, "0b101": 5, "1.0e-3": 1e-3,
    "08": "08", "1e": "1e", "e5": "e5", "1.2.3": "1.2.3", "2026-01-01": "2026-01-01", "2026-13-45": "2026-13-45",
    "yes": True, "off": False, "'1e-3'": "1e-3", "!!str 1e-3": "1e-3", "~": None, "4:99": "4:99", ":4": ":4",
}  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_how_plain_values_read(text: str) -> None:
    """Numbers read as people write them; texts, dates among them, stay as they stand."""
    found = yamldoc.parse(text).data
    assert found == PLAIN[text]
    assert type(found) is type(PLAIN[text])
    assert yamldoc.scalar(text).data == PLAIN[text]


class Mixed(Strict):
    share: float = 1.0
    whole: int = 1
    exact: Real = 1.0
    text: str = ""
    switch: bool = False
    many: tuple[float, ...] = ()
    either: float | str | None = None


NUMBERS = {
    "share: 1e-3": ("share", 1e-3), "exact: 1e-3": ("exact", 1e-3), "many: [1e-3, 2E+1]": ("many", (1e-3, 20.0)), "either: 1e-1": ("either", 0.1),
    "text: 1e-3": ("text", "1e-3"), "text: -.5": ("text", "-.5"), "text: 2026-01-01": ("text", "2026-01-01"), "whole: 1_000": ("whole", 1000),
    "share: '0.5'": ("share", 0.5), "whole: 2.0": ("whole", 2), "switch: on": ("switch", True), "either: file.jsonl": ("either", "file.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_in_fields(text: str) -> None:
    name, value = NUMBERS[text]
    found = getattr(yamldoc.parse(text).validate(Mixed), name)
    assert found == value
    assert type(found) is type(value)


QUOTES = "YAML reads this as {}: put it in quotes."
TRUTH = "YAML reads yes, no, on, off, true and false as booleans: write a number."
REFUSED = {
    "share: yes": ("<text>:1:1 share: expected a valid number, found True", TRUTH),
    "many: [1, off]": ("<text>:1:11 many.1: expected a valid number, found False", TRUTH),
    "whole: on": ("<text>:1:1 whole: expected a valid integer, found True", TRUTH),
    "exact: yes": ("<text>:1:1 exact: expected a valid number, found True", TRUTH),
    "text: no": ("<text>:1:1 text: expected a valid string, found False", QUOTES.format("bool")),
    "text: 1_000": ("<text>:1:1 text: expected a valid string, found 1000", QUOTES.format("int")),
    "text: 1.5": ("<text>:1:1 text: expected a valid string, found 1.5", QUOTES.format("float")),
    "share: .inf": ("<text>:1:1 share: expected a finite number, found inf", None),
    "share: .nan": ("<text>:1:1 share: expected a finite number, found nan", None),
}


@pytest.mark.parametrize("text", REFUSED)
def test_values_of_another_kind(text: str) -> None:
    with pytest.raises(WorkbenchError) as caught:
        yamldoc.parse(text).validate(Mixed)
    assert (caught.value.message, caught.value.hint) == REFUSED[text]


@pytest.mark.parametrize("text", ["1e-3", "-.5", "010", "1:30", "yes", "2026-01-01", "1_000", "1.2.3", "x: y", "a\nb", "é", "08"])
def test_what_is_written_reads_back_equal(text: str) -> None:
    data = {"a": text, text if text != "a\nb" else "k": [text, 1e-7, 1e20, 3, True, None]}
    assert yamldoc.parse(yamldoc.dump(data)).data == data


def test_an_octal_number_says_what_to_type() -> None:
    with pytest.raises(WorkbenchError) as caught:
        yamldoc.parse("a: 010")
    assert caught.value.hint == 'Write 10 for the number 10, or put "010" in quotes if it is a text.'

"""Patterns of module names in adapter_config.json, matched in time linear in the name: such a file may come from anyone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from workbench.errors import WorkbenchError

MAX_LENGTH = 10_000
MAX_EXPRESSIONS = 256
# What PEFT writes itself: a module's name, as it is or escaped, perhaps from the start. An unescaped dot stands for any character.
_NAME = re.compile(r"(\^?)((?:[A-Za-z0-9_-]|\\[.\-_]|\.)+)")
# Python and RE2 read these differently: x{,3}, [[:alpha:]].
_TWO_MEANINGS = re.compile(r"\{,|\[\[")
_HINT = (
    "Patterns are regular expressions without lookaround and backreferences, as RE2 reads them: name the modules instead, as in "
    '"layers.3.self_attn.q_proj", or join names with |.'
)


class Patterns:
    """`alpha_pattern` or `rank_pattern`, matched by PEFT's rule: re.match(rf"(.*\\.)?({pattern})$", module).

    Args:
        patterns: Pattern -> number.
        where: How errors call it: the file and the field.

    Raises:
        WorkbenchError: A pattern that is no regular expression, or one that needs lookaround or backreferences, which no engine
            matches in linear time; more than 256 patterns that are not plain names.
    """

    def __init__(self, patterns: Mapping[str, float] | None, where: str) -> None:
        self._values = list((patterns or {}).values())
        # (length, places of any character, from the start) -> the other characters -> number of the first such pattern
        self._names: dict[tuple[int, tuple[int, ...], bool], dict[str, int]] = {}
        self._expressions: list[tuple[int, Any]] = []
        for number, pattern in enumerate(patterns or ()):
            if name := _NAME.fullmatch(pattern):
                self._add_name(number, name[2], bool(name[1]))
            elif len(self._expressions) == MAX_EXPRESSIONS:
                raise WorkbenchError(f"{where}: more than {MAX_EXPRESSIONS} patterns that are not names of modules", _HINT)
            else:
                self._expressions.append((number, _compiled(pattern, where)))

    def value(self, module: str, default: float) -> float:
        """Return the number of the first pattern that matches the end of the module's name, at a dot; else the default."""
        found = [number for number, expression in self._expressions if expression.fullmatch(module)]
        ends = [0, *(i + 1 for i, character in enumerate(module) if character == ".")]
        for (length, anywhere, anchored), names in self._names.items():
            start = len(module) - length
            if start in ((0,) if anchored else ends) and (name := _without(module[start:], anywhere)) in names:
                found.append(names[name])
        return self._values[min(found)] if found else default

    def _add_name(self, number: int, pattern: str, anchored: bool) -> None:
        parts = re.findall(r"\\.|.", pattern)
        anywhere = tuple(i for i, part in enumerate(parts) if part == ".")
        name = _without("".join(part[-1] for part in parts), anywhere)
        self._names.setdefault((len(parts), anywhere, anchored), {}).setdefault(name, number)


def _without(name: str, anywhere: tuple[int, ...]) -> str:
    """Return the name with a mark in place of the characters that may be any."""
    characters = list(name)
    for i in anywhere:
        characters[i] = "\0" if characters[i] != "\n" else "\n"
    return "".join(characters)


def _compiled(pattern: str, where: str) -> Any:
    """Return the whole rule as a regular expression of RE2. Raises WorkbenchError where RE2 and Python do not both read it, and alike."""
    import re2

    said = f"it has {len(pattern):,} characters, expected up to {MAX_LENGTH:,}" if len(pattern) > MAX_LENGTH else ""
    if _TWO_MEANINGS.search(pattern):
        said = "{,n} and [[ have two meanings"
    if not said:
        options = re2.Options()
        options.log_errors = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(rf"(.*\.)?({pattern})$")
            return re2.compile(rf"(?:.*\.)?(?:{pattern})", options)
        except re2.error as error:
            reason = error.args[0] if error.args else ""
            said = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        except (re.error, RecursionError, OverflowError) as error:
            said = str(error)
    raise WorkbenchError(f"{where}: the pattern {pattern[:80]!r} cannot be matched: {said[:120]}", _HINT)

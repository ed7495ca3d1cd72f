"""Patterns of module names in adapter_config.json. Matching takes linear time, because the file may come from anyone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from workbench.errors import WorkbenchError

MAX_LENGTH = 10_000
MAX_EXPRESSIONS = 256
# Patterns that PEFT writes itself: a module's name, plain or escaped, possibly anchored by ^. An unescaped dot matches any character.
_NAME = re.compile(r"(\^?)((?:[A-Za-z0-9_-]|\\[.\-_]|\.)+)")
# Python and RE2 interpret these differently: x{,3}, [[:alpha:]].
_TWO_MEANINGS = re.compile(r"\{,|\[\[")
_HINT = (
    "Patterns are RE2 regular expressions, without lookaround and backreferences. Use module names instead, such as "
    '"layers.3.self_attn.q_proj", or join names with |.'
)


class Patterns:
    r"""Matcher for `alpha_pattern` or `rank_pattern`, by PEFT's rule: re.match(rf"(.*\.)?({pattern})$", module).

    Args:
        patterns: Pattern -> number.
        label: The file and the field, for error messages.

    Raises:
        WorkbenchError: If a pattern is not a regular expression, or requires lookaround or backreferences, which cannot be
            matched in linear time; if more than 256 patterns are not plain names.
    """

    def __init__(self, patterns: Mapping[str, float] | None, label: str) -> None:
        self._values = list((patterns or {}).values())
        # (length, positions of wildcards, anchored) -> name with wildcards blanked -> index of the first such pattern
        self._names: dict[tuple[int, tuple[int, ...], bool], dict[str, int]] = {}
        self._expressions: list[tuple[int, Any]] = []
        for number, pattern in enumerate(patterns or ()):
            if name := _NAME.fullmatch(pattern):
                self._add_name(number, name[2], bool(name[1]))
            elif len(self._expressions) == MAX_EXPRESSIONS:
                raise WorkbenchError(f"{label}: more than {MAX_EXPRESSIONS} patterns that are not names of modules", _HINT)
            else:
                self._expressions.append((number, _compiled(pattern, label)))

    def value(self, module: str, default: float) -> float:
        """Return the number of the first pattern that matches the whole module name or its last components, else the default."""
        matches = [number for number, expression in self._expressions if expression.fullmatch(module)]
        ends = [0, *(i + 1 for i, character in enumerate(module) if character == ".")]
        for (length, anywhere, anchored), names in self._names.items():
            start = len(module) - length
            if start in ((0,) if anchored else ends) and (name := _with_wildcards_marked(module[start:], anywhere)) in names:
                matches.append(names[name])
        return self._values[min(matches)] if matches else default

    def _add_name(self, number: int, pattern: str, anchored: bool) -> None:
        parts = re.findall(r"\\.|.", pattern)
        anywhere = tuple(i for i, part in enumerate(parts) if part == ".")
        name = _with_wildcards_marked("".join(part[-1] for part in parts), anywhere)
        self._names.setdefault((len(parts), anywhere, anchored), {}).setdefault(name, number)


def _with_wildcards_marked(name: str, anywhere: tuple[int, ...]) -> str:
    """Return the name with a marker in place of wildcard characters."""
    characters = list(name)
    for i in anywhere:
        characters[i] = "\0" if characters[i] != "\n" else "\n"
    return "".join(characters)


def _compiled(pattern: str, label: str) -> Any:
    """Compile PEFT's rule with RE2; raise WorkbenchError unless RE2 and Python both accept the pattern with the same meaning."""
    import re2

    problem = f"it has {len(pattern):,} characters, expected up to {MAX_LENGTH:,}" if len(pattern) > MAX_LENGTH else ""
    if _TWO_MEANINGS.search(pattern):
        problem = "{,n} and [[ mean different things in Python and RE2"
    if not problem:
        options = re2.Options()
        options.log_errors = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(rf"(.*\.)?({pattern})$")
            return re2.compile(rf"(?:.*\.)?(?:{pattern})", options)
        except re2.error as error:
            reason = error.args[0] if error.args else ""
            problem = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        except (re.error, RecursionError, OverflowError) as error:
            problem = str(error)
    raise WorkbenchError(f"{label}: the pattern {pattern[:80]!r} is not supported: {problem[:120]}", _HINT)

"""Output of recipe data as readable YAML."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from workbench import yamldoc

_BLOCKS = ("bricks", "parameters")
WIDTH = 130


def comment(text: str) -> str:
    """Return a YAML comment, wrapped if it is long."""
    return "\n".join(textwrap.wrap(text, WIDTH, initial_indent="# - ", subsequent_indent="#   ", break_long_words=False))


def recipe_text(data: Mapping[str, Any], head: Iterable[str]) -> str:
    """Return the text of a recipe: head lines, then fields. Mappings of bricks and lists of rules have one entry per line."""
    lines = list(head)
    for key, value in data.items():
        lines += _field(key, value, "")
    return "\n".join(lines) + "\n"


def _field(key: str, value: Any, indent: str) -> list[str]:
    """Return the lines of a field; some mappings and lists of rules are written as blocks."""
    head = f"{indent}{_inline(key)}:"
    if isinstance(value, dict) and value and (key in _BLOCKS or _has_rules(value)):
        return [head, *(line for name, inner in value.items() for line in _field(name, inner, indent + "  "))]
    if _is_rules(value):
        entries = []
        for entry in value:
            if "merge" in entry or ("grow" in entry and len(_inline(entry)) > WIDTH - 10):
                first, *rest = (line for k, v in entry.items() for line in _field(k, v, indent + "    "))
                entries += [f"{indent}  - {first.strip()}", *rest]
            else:
                entries.append(f"{indent}  - {_inline(entry)}")
        return [head, *entries]
    return [f"{head} {_inline(value)}"]


def _is_rules(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _has_rules(value: Any) -> bool:
    return _is_rules(value) or (isinstance(value, dict) and any(_has_rules(inner) for inner in value.values()))


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yamldoc.dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()

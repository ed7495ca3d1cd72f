"""Origin of the parts of a stack, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def told_blocks(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (part of the result, its source) for a step's record or plan row.

    Example: ("layers 0-15", "brick one, layers 0-15"), ("layers 16-23", "ties of one 16-23, two 18-25 on base"), ("head", "brick two").

    Args:
        record: The row of a `grow: stack` step; other steps yield nothing.
    """
    for block in record.get("blocks", ()):
        layers = f"layer{'s' if '-' in block['layers'] else ''} {block['layers']}"
        if "merge" not in block:
            yield layers, f"{_named(block['source'])}, {_layers(block['from'])}"
            continue
        bricks = ", ".join(f"{name} {span}" for name, span in block["bricks"].items())
        yield layers, f"{block['merge']} of {bricks}; deltas from {block['base'] or 'the configuration so far'} {block['from']}"
    for part in ("embeddings", "norm", "head", "tokenizer"):
        source = record.get(part) if record.get("blocks") else None
        if isinstance(source, Mapping):
            yield part, f"{source['merge']} of {', '.join(source['bricks'])}"
        elif source:
            yield part, _named(source)


def _layers(span: str) -> str:
    return f"layer{'s' if '-' in span else ''} {span}"


def _named(source: str) -> str:
    return source if " " in source else f"brick {source}"

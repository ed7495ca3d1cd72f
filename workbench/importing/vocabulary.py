"""`tokenizer_source`, `tokenizer` and `chat_template` of a mergekit YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.importing.config import Config


def carry_vocabulary(config: Config, places: Mapping[str, Path | None], names: Mapping[str, str]) -> dict[str, Any]:
    """Fields of the recipe that choose the vocabulary; none where all inputs have the same one, so that no row moves.

    Args:
        config: The configuration; what does not carry over goes to its report.
        places: Reference -> directory of the model, where it is at hand.
        names: Reference -> brick name.
    """
    data, report = config.data, config.report
    if data.get("tokenizer_source") and data.get("tokenizer"):
        report.refuse(("tokenizer",), "stands beside tokenizer_source; mergekit refuses both together")
        return {}
    if data.get("chat_template"):
        report.note(("chat_template",), "not carried over: the output keeps the base's template; its weights are the same")
    key = next((key for key in ("tokenizer_source", "tokenizer") if data.get(key)), None)
    if key is None:
        return {}
    block = data[key] if isinstance(data[key], dict) and key == "tokenizer" else {"source": data[key]}
    if block.get("tokens") or block.get("pad_to_multiple_of"):
        report.refuse((key,), "tokens and pad_to_multiple_of change rows of the embeddings: not carried over yet")
    elif _one_vocabulary(places):
        report.note((key,), "all inputs have the same vocabulary: no row moves, left out")
    else:
        report.refuse((key,), f"{block.get('source', 'union')}: the inputs' vocabularies differ, or are not at hand to compare: "
                      "aligning them is not carried over yet")  # fmt: skip
    return {}


def _one_vocabulary(places: Mapping[str, Path | None]) -> bool:
    """Whether all models have the same tokens at the same rows, and no row beyond them."""
    found = [None if path is None else _vocabulary(path) for path in places.values()]
    return all(one is not None and one == found[0] for one in found)


def _vocabulary(path: Path) -> tuple[dict[str, int], int] | None:
    """Token -> row; number of rows. None where a file is missing, or where rows and tokens differ in number."""
    try:
        document = json.loads((path / "tokenizer.json").read_text("utf-8"))
        rows = int(json.loads((path / "config.json").read_text("utf-8"))["vocab_size"])
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {token: row for row, (token, _) in enumerate(vocabulary)}
        tokens = {**vocabulary, **{added["content"]: added["id"] for added in document.get("added_tokens", [])}}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (tokens, rows) if sorted(tokens.values()) == list(range(rows)) else None

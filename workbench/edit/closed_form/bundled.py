"""Data that comes with the workbench: texts for the statistics of edits, and well-known facts."""

from __future__ import annotations

import json
import lzma
from importlib.resources import as_file, files

from workbench.facts import Fact, read_facts

_DATA = files("workbench.edit.closed_form") / "data"
STATISTICS = "statistics.jsonl.xz"
KNOWN = "known.jsonl"


def statistics_texts() -> list[str]:
    """Return paragraphs of English text for the second moments of keys, used if a recipe names no text.

    Their order is random but fixed in each release of the file, so that the first n are a fair sample. Sources and licenses are
    listed in `workbench/edit/closed_form/data/README.md`.
    """
    lines = lzma.decompress((_DATA / STATISTICS).read_bytes()).decode("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def known_facts() -> list[Fact]:
    """Return facts of common knowledge, each with its true answer, a counterfactual target, two paraphrases and three neighbors.

    No subject occurs in two facts, and no neighbor asks for an edited fact, so all of them can be edited at once. A small model
    knows only some of them; the caller must check which.
    """
    with as_file(_DATA / KNOWN) as path:
        return read_facts(path, KNOWN)

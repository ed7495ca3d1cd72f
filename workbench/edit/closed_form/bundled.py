"""Data that comes with the workbench: texts for the statistics of edits, and facts that are well known."""

from __future__ import annotations

import json
import lzma
from importlib.resources import as_file, files

from workbench.facts import Fact, read_facts

_DATA = files("workbench.edit.closed_form") / "data"
STATISTICS = "statistics.jsonl.xz"
KNOWN = "known.jsonl"


def statistics_texts() -> list[str]:
    """Paragraphs of English running text, for the second moments of keys where a recipe names no texts.

    Their order is random and the same in every release of the file, so that the first n are a fair sample. Sources and licences:
    `workbench/edit/data/README.md`.
    """
    lines = lzma.decompress((_DATA / STATISTICS).read_bytes()).decode("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def known_facts() -> list[Fact]:
    """Facts of common knowledge, each with what is true, a counterfactual target, two paraphrases and three neighbours.

    No subject stands in two facts, and no neighbour asks what a fact edits: all of them can be edited at once. Which of them a
    base knows is for the caller to ask; small models know a part.
    """
    with as_file(_DATA / KNOWN) as path:
        return read_facts(path, KNOWN)

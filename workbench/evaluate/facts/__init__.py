"""Facts as suites of lm-eval tasks: efficacy, paraphrases, neighbors, portability, generated answers, entropy and perplexity."""

from __future__ import annotations

from workbench.evaluate.facts.suite import build, export_facts
from workbench.evaluate.facts.wanted import (
    EDITS,
    PREFIX,
    Wanted,
    checkpoints,
    edited_for,
    facts_digest,
    facts_of_edits,
    read_step,
    sequential,
    streams_of,
    wanted,
)

__all__ = [
    "EDITS",
    "PREFIX",
    "Wanted",
    "build",
    "checkpoints",
    "edited_for",
    "export_facts",
    "facts_digest",
    "facts_of_edits",
    "read_step",
    "sequential",
    "streams_of",
    "wanted",
]

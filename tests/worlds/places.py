"""Folders of this checkout that tests read."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PROJECT = TESTS.parent
"""The checkout's own folder."""
EVALS = PROJECT / "evals"
TASKS = EVALS / "tasks"
STARTER = PROJECT / "bricks" / "starter" / "base"
"""The starter base, which `workbench brick fetch starter` downloads."""
FIXTURES = TESTS / "fixtures"
PUBLIC = PROJECT.parent / "shared" / "data" / "editing"
"""Published fact sets beside the checkout; tests that read them are skipped where they are missing."""


PARTS = (
    "serve",
    "view",
    "ship",
    "upkeep",
    "advice",
    "transplant",
    "fuse",
    "neurons",
    "search",
    "exchange",
    "quantized",
    "averaging",
    "suites",
    "trackers",
    "embeddings",
)
"""The parts of the workbench. The tests of a part are in the folder of tests with its name."""


def of_the_pinned_transformers() -> bool:
    """True if transformers has the minor version in constraints.txt, for which the tables of all families were made."""
    pinned = next(
        line for line in (PROJECT / "constraints.txt").read_text("utf-8").splitlines() if line.startswith("transformers==")
    )
    return pinned.removeprefix("transformers==").split(".")[:2] == version("transformers").split(".")[:2]

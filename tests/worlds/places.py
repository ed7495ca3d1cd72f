"""Folders of this checkout that tests read."""

from __future__ import annotations

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

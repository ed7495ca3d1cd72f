"""What `eval`, `compare` and `report` do with what they open, and single configurations for other commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.subjects import Listener
from workbench.cli._output import out
from workbench.errors import shell

if TYPE_CHECKING:
    from workbench.compare.compare import Comparison
    from workbench.compare.sweeps import Sweep
    from workbench.scores.store import Scores, ScoreStore


def printing() -> Listener:
    """Return the listener that prints on the terminal."""
    return Listener(out.event, out.say, out.warn)


def command_line() -> str:
    """Return the command line of this process."""
    return shell("workbench", *sys.argv[1:])


def compare_scores(
    store: ScoreStore, scores: list[Scores], baseline: str | None, project: Path, sweeps: Sequence[Sweep] = ()
) -> Comparison:
    """Compare scores, and record the command line that makes the comparison."""
    from workbench.compare.compare import compare

    return compare(store, scores, baseline=baseline, project=project, command=command_line(), sweeps=sweeps)

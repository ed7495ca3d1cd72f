"""Logging to a tracker: it is opened before any work, and takes its runs when all scores are stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

from workbench.errors import UsageError, WorkbenchError
from workbench.report.numbers import plural
from workbench.report.trackers.runs import LoggedRun

Tool = Literal["mlflow", "wandb"]
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


class Tracker(Protocol):
    """An experiment tracker.

    Attributes:
        place: Project and store of the runs, for messages.
    """

    place: str

    def log(self, run: LoggedRun) -> None:
        """Log a run; a run that was logged with the same key is updated."""


def open_tracker(tool: Tool | None, project: str | None) -> Tracker | None:
    """Open a tracker and check its settings. No server is asked yet.

    Args:
        tool: Value of `--log`; None to log nothing.
        project: Value of `--log-project`.

    Returns:
        The tracker; None if nothing is logged.

    Raises:
        WorkbenchError: If the tracker is not installed, its settings are invalid, or a project is named without a tracker.
    """
    if tool is None:
        if project is not None:
            raise UsageError(f"--log-project {project}: nothing is logged without --log", "Add --log mlflow or --log wandb.")
        return None
    if project is not None and not project.strip():
        raise UsageError("--log-project: the name is empty", "Name a project, or leave the option out.")
    try:
        if tool == "mlflow":
            from workbench.report.trackers.mlflow_runs import MlflowRuns

            return MlflowRuns(project)
        from workbench.report.trackers.wandb_runs import WandbRuns

        return WandbRuns(project)
    except WorkbenchError:
        raise
    except ImportError as error:
        reason = "it is not installed" if error.name == tool else _reason(error)
        raise WorkbenchError(f"--log {tool}: cannot import {tool}: {reason}", "pip install 'brick-workbench[log]'") from None
    except Exception as error:
        raise WorkbenchError(f"--log {tool}: {_reason(error)}", f"Change the settings of {tool}.") from error


def log_runs(tracker: Tracker, runs: Sequence[LoggedRun]) -> str:
    """Log runs, and return a message that says where they are.

    Args:
        tracker: The tracker.
        runs: The runs.

    Raises:
        WorkbenchError: If the tracker fails. Everything is stored before, so that a repeated command only logs.
    """
    done = 0
    try:
        for run in runs:
            tracker.log(run)
            done += 1
    except Exception as error:
        raise WorkbenchError(
            f"{done} of {plural(len(runs), 'run')} logged to {_public(tracker.place)}, then it failed: {_reason(error)}",
            "All scores are stored. Run the same command again: it scores nothing, and logs all runs again.",
        ) from error
    return f"logged {plural(done, 'run')} to {_public(tracker.place)}"


def _reason(error: Exception) -> str:
    """Return the first line of an error's text, without the login of a URL."""
    return _public(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)


def _public(text: str) -> str:
    return _LOGIN.sub("…@", text)

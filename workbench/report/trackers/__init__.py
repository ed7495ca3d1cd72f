"""Scores and searches as runs of an experiment tracker: MLflow or Weights & Biases."""

from __future__ import annotations

from workbench.report.trackers.log import Tracker, log_runs, open_tracker
from workbench.report.trackers.runs import LoggedRun, runs_of_scores, runs_of_search

__all__ = ["LoggedRun", "Tracker", "log_runs", "open_tracker", "runs_of_scores", "runs_of_search"]

"""Runs in MLflow, through its client."""

from __future__ import annotations

import os
import re
import time
from functools import cached_property

from workbench.report.trackers.runs import LoggedRun

_KEY = "workbench.key"
"""Tag by which a run is found again."""
_LONGEST = 6000
"""Characters of a parameter or tag that are kept; MLflow refuses longer ones."""
_BATCH = 100
"""Parameters or tags that MLflow takes in one call."""


class MlflowRuns:
    """Runs of one experiment, in the store of MLFLOW_TRACKING_URI. MLflow's own telemetry is switched off.

    Args:
        experiment: Name of the experiment, which is created if it does not exist; None for MLFLOW_EXPERIMENT_NAME, else "workbench".
    """

    def __init__(self, experiment: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient, get_tracking_uri

        self._client = MlflowClient()
        self._name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "workbench"
        self.place = f"mlflow: experiment {self._name} at {get_tracking_uri()}"

    @cached_property
    def _experiment(self) -> str:
        from mlflow import set_experiment

        return str(set_experiment(self._name).experiment_id)

    def log(self, run: LoggedRun) -> None:
        """Log a run; a run that was logged with the same key is updated."""
        from mlflow.entities import Metric, Param, RunTag

        client, now = self._client, int(time.time() * 1000)
        known = client.search_runs([self._experiment], filter_string=f"tags.`{_KEY}` = '{run.key}'", max_results=1)
        entry = known[0] if known else client.create_run(self._experiment, run_name=run.name, tags={_KEY: run.key})
        params = [Param(_accepted(name), str(value)[:_LONGEST]) for name, value in run.params.items()]
        tags = [RunTag(_accepted(name), text[:_LONGEST]) for name, text in {**run.tags, "group": run.group}.items()]
        metrics = [Metric(_accepted(name), value, now, 0) for name, value in run.metrics.items()]
        status = "FAILED"
        try:
            for start in range(0, max(map(len, (params, tags, metrics))), _BATCH):
                part = slice(start, start + _BATCH)
                client.log_batch(entry.info.run_id, metrics=metrics[part], params=params[part], tags=tags[part])
            status = "FINISHED"
        finally:
            client.set_terminated(entry.info.run_id, status)


def _accepted(name: str) -> str:
    """Return a name in the letters that every store of MLflow accepts; others become "_"."""
    return re.sub(r"[^\w.\- /]", "_", name)

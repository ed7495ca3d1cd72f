"""Scores as runs of an experiment tracker, MLflow or Weights & Biases.

A tracker is opened before any work, and takes its runs when all scores are stored. Its package is imported only then.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from workbench.compare.configurations import costs_of
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.identity import installed
from workbench.ground.numbers import plural
from workbench.recipe.recipe import Recipe, dump_steps

if TYPE_CHECKING:
    from workbench.evaluate.lineup import LineupEntry
    from workbench.scores.store import Scores

Value = str | int | float | bool


@dataclass(frozen=True)
class LoggedRun:
    """One run.

    Attributes:
        name: Displayed name.
        group: Name that the runs of one evaluation or search share.
        key: Digest of what is scored; a run that is logged again has the same key.
        params: Base, seed and fields of the recipe's steps, or a candidate's values.
        metrics: Finite numbers by name; the ends of a 95 % interval are NAME_low and NAME_high.
        tags: Role, digests and versions.
    """

    name: str
    group: str
    key: str
    params: Mapping[str, Value]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


def runs_of_scores(entries: Sequence[LineupEntry], scores: Sequence[Scores]) -> list[LoggedRun]:
    """Return one run for each scored configuration.

    Args:
        entries: The configurations.
        scores: Their scores, one for each configuration and suite.
    """
    runs = []
    for entry in entries:
        own = [s for s in scores if s.configuration.name == entry.name]
        if not own:
            continue
        configuration = own[0].configuration
        tags = {
            "role": configuration.role,
            "digest": configuration.digest,
            "recipe": configuration.recipe,
            **{f"plan.{s.suite}": s.plan for s in own},
        }
        group = " ".join(dict.fromkeys(s.suite for s in scores))
        runs.append(logged_run(entry.name, group, _params(entry.resolved.recipe), _measured(own), tags))
    return runs


def logged_run(
    name: str, group: str, params: Mapping[str, Value], metrics: Mapping[str, float | None], tags: Mapping[str, str | None]
) -> LoggedRun:
    """Return a run without numbers and tags that are not known."""
    known = {tag: text for tag, text in tags.items() if text}
    known["workbench"] = installed("brick-workbench")["brick-workbench"]
    numbers = {metric: float(value) for metric, value in metrics.items() if value is not None and math.isfinite(value)}
    return LoggedRun(name, group, json_digest([name, dict(params), known]), params, numbers, known)


def _params(recipe: Recipe) -> dict[str, Value]:
    """Return the base, the seed and the fields of a recipe's steps under dotted names, such as "mix.density"."""
    params: dict[str, Value] = {"base": recipe.fields.base_name, "seed": recipe.fields.seed}
    for name, step in zip(recipe.step_ids, dump_steps(recipe), strict=True):
        params.update(_flat(name, step))
    return params


def _flat(name: str, value: Any) -> Iterable[tuple[str, Value]]:
    """Yield the fields of nested mappings under dotted names; fields without a value are skipped."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif value is not None:
        yield name, _plain(value)


def _plain(value: Any) -> Value:
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value, ensure_ascii=False)


def _measured(own: Sequence[Scores]) -> dict[str, float | None]:
    """Return a configuration's scores by suite, task and metric with their intervals, the numbers of items, and its costs."""
    found: dict[str, float | None] = {}
    for s in own:
        for task, result in s.tasks.items():
            found[f"{s.suite}/{task}/n"] = result.n
            for metric, value in result.metrics.items():
                name = f"{s.suite}/{task}/{metric}"
                found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    costs, configuration = costs_of(own, ()), own[0].configuration
    found |= {"cost/seconds": costs.seconds, "cost/peak_bytes": costs.peak_bytes}
    return {**found, "cost/parameters": configuration.parameters, "cost/bytes": configuration.bytes}


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
        return MlflowRuns(project) if tool == "mlflow" else WandbRuns(project)
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


class WandbRuns:
    """Runs of one project. WANDB_MODE, WANDB_DIR, WANDB_ENTITY and the other settings of wandb hold.

    Only what `LoggedRun` holds is logged: no terminal output, command line, code, git remote or load of the machine. wandb adds the machine's
    name, and the versions of Python and wandb.

    Args:
        project: Name of the project; None for WANDB_PROJECT, else "workbench".
    """

    def __init__(self, project: str | None) -> None:
        from wandb import Settings, login, setup

        mode = setup(Settings(silent=True)).settings.mode
        if mode == "disabled":
            raise UsageError(
                "--log wandb: WANDB_MODE=disabled switches wandb off", "WANDB_MODE=offline keeps the runs in wandb/."
            )
        if mode == "online" and not login(prompt=False, verify=False):
            raise WorkbenchError(
                "--log wandb: wandb is not logged in", "wandb login, or WANDB_MODE=offline to keep the runs in wandb/"
            )
        self._project = project or os.environ.get("WANDB_PROJECT") or "workbench"
        self.place = f"wandb: project {self._project} ({mode})"

    def log(self, run: LoggedRun) -> None:
        """Log a run; a run that was logged with the same key is updated."""
        import wandb

        settings = wandb.Settings(
            console="off",
            save_code=False,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        with wandb.init(
            project=self._project,
            id=run.key,
            name=run.name,
            group=run.group,
            job_type=run.tags["role"],
            config={**run.params, "workbench": dict(run.tags)},
            resume="allow",
            reinit="create_new",
            settings=settings,
        ) as active:
            active.log(dict(run.metrics))

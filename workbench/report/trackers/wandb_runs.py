"""Runs in Weights & Biases, through its Python API."""

from __future__ import annotations

import os

from workbench.errors import UsageError, WorkbenchError
from workbench.report.trackers.runs import LoggedRun


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

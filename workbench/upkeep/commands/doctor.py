"""Command `doctor`."""

from __future__ import annotations

import typer

from workbench.console.options import JsonOpt, RunsOpt
from workbench.console.output import out


def doctor(runs_dir: RunsOpt = None, as_json: JsonOpt = False) -> None:
    """Check the installation, and rebuild what can be rebuilt.

    Reports on the compiler, kernels, caches, device, versions and disk space. Exits with 3 if a problem remains.
    """
    from workbench.ground.project import find_project, runs_of
    from workbench.upkeep.doctor import examine

    project = find_project()
    checkup = examine(project, runs_dir or runs_of(project))

    def text() -> None:
        out.table(("check", "status", "found"), [(f.check, f.status, f.text) for f in checkup.checks])
        for finding in checkup.checks:
            if finding.hint:
                out.say(f"{finding.check}: {finding.hint}")

    out.result(lambda: checkup, text, json=as_json)
    if any(finding.status == "failed" for finding in checkup.checks):
        raise typer.Exit(3)

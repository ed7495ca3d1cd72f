"""Trusted projects: the projects whose method files may run, as the user's own settings or the environment say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench import yamldoc
from workbench.errors import WorkbenchError
from workbench.files import write_text
from workbench.steps.fields import Strict

VARIABLE = "WORKBENCH_TRUST_PROJECT_CODE"
"""Environment variable that trusts every project of a process, and of the processes that it starts, if it is 1."""
FLAG = "--trust-project-code"


class Settings(Strict):
    """The user's settings, which lie outside every project."""

    trusted_projects: tuple[str, ...] = ()
    """Absolute paths of the projects whose method files are loaded."""


def settings_file() -> Path:
    """Return the path of the user's settings file.

    Raises:
        WorkbenchError: If the user has no home folder and XDG_CONFIG_HOME is not set.
    """
    configured = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if configured.is_absolute():
        return configured / "workbench" / "settings.yaml"
    try:
        home = Path.home() if os.environ.get("HOME") != "" else Path()  # pathlib reads an empty HOME as /
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise WorkbenchError("settings: this user has no home folder", "Set HOME, or XDG_CONFIG_HOME, to an absolute path.")
    return home / ".config" / "workbench" / "settings.yaml"


def read_settings() -> Settings:
    """Return the user's settings, or the defaults if there is no settings file.

    Raises:
        WorkbenchError: If the file is damaged, or if there is no place for it.
    """
    file = settings_file()
    if not file.is_file():
        return Settings()
    document = yamldoc.load(file, str(file))
    return Settings() if document.data is None else document.validate(Settings)


def is_trusted(project: Path) -> bool:
    """Return whether the method files of a project may run.

    Args:
        project: The project's folder; links are followed.

    Raises:
        WorkbenchError: If the user's settings file is damaged.
    """
    if os.environ.get(VARIABLE) == "1":
        return True
    try:
        settings_file()
    except WorkbenchError:
        return False
    return str(project.resolve()) in read_settings().trusted_projects


def trust(project: Path) -> bool:
    """Add a project to the user's trusted projects; return False if it is there already.

    Raises:
        WorkbenchError: If the folder does not exist, or if the settings cannot be read or written.
    """
    if not project.is_dir():
        raise WorkbenchError(f"{project}: no such folder", "Name the project's folder, which holds methods/ and recipes/.", 2)
    trusted = read_settings().trusted_projects
    path = str(project.resolve())
    if path in trusted:
        return False
    _write((*trusted, path))
    return True


def distrust(project: Path) -> None:
    """Remove a project, which need not exist any more, from the user's trusted projects.

    Raises:
        WorkbenchError: If it is not among them, or if the settings cannot be read or written.
    """
    trusted = read_settings().trusted_projects
    path = str(project.resolve())
    if path not in trusted:
        raise WorkbenchError(f"{path}: not a trusted project", "`workbench trust` lists the trusted projects.", 2)
    _write(tuple(entry for entry in trusted if entry != path))


@contextmanager
def trusting(yes: bool) -> Iterator[None]:
    """Trust every project inside the context, also in processes that are started there, if `yes`."""
    before = os.environ.get(VARIABLE)
    if yes:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if yes and before is None:
            os.environ.pop(VARIABLE, None)
        elif yes and before is not None:
            os.environ[VARIABLE] = before


def _write(projects: tuple[str, ...]) -> None:
    write_text(settings_file(), yamldoc.dump({"trusted_projects": list(projects)}))

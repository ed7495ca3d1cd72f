"""The gate for a project's own code: what may run, as the user's own settings or the environment say, and how it is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import ExecutionLoader
from importlib.util import decode_source, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from workbench.ground import yamldoc
from workbench.ground.errors import InvalidRecipeError, UsageError, WorkbenchError, shell
from workbench.ground.files import write_text
from workbench.ground.manifest import sha256_of
from workbench.ground.results import JsonObject

VARIABLE = "WORKBENCH_TRUST_PROJECT_CODE"
"""Environment variable that trusts every project of a process, and of the processes that it starts, if it is 1."""
FLAG = "--trust-project-code"
FOLDERS = ("methods", "evals")
"""Folders of a project that hold code: its methods, and the functions of its tasks."""


class Plugin(JsonObject):
    """Origin of a method that is not built in."""

    source: str
    """Distribution and version, or path of a method file of the project."""
    digest: str
    """Digest of the method's code, which is a part of every cache key of its steps."""


class Settings(BaseModel):
    """The user's settings, which lie outside every project."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trusted_projects: Mapping[str, Mapping[str, str]] = {}
    """Absolute path of a trusted project -> its Python files -> their digests when the user trusted it."""

    @field_validator("trusted_projects", mode="before")
    @classmethod
    def _without_digests(cls, value: Any) -> Any:
        """Read the list of paths that versions up to 0.2 wrote; their files have no digests and must be trusted again."""
        return {path: {} for path in value} if isinstance(value, list) and all(isinstance(path, str) for path in value) else value


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


def code_files(project: Path) -> dict[str, Path]:
    """Return the Python files of a project's `methods/` and `evals/` by their paths in the project."""
    found = (file for folder in FOLDERS for file in (project / folder).rglob("*.py") if file.is_file())
    return {file.relative_to(project).as_posix(): file for file in sorted(found)}


def distrusted(project: Path) -> str | None:
    """Return the reason why a project's code may not run; None if it may.

    Args:
        project: The project's folder; links are followed.

    Raises:
        WorkbenchError: If the user's settings file is damaged.
    """
    if unchecked():
        return None
    try:
        settings_file()
    except WorkbenchError:
        return f"{project} is not a trusted project"
    known = read_settings().trusted_projects.get(str(project.resolve()))
    if known is None:
        return f"{project} is not a trusted project"
    changed = [name for name, digest in _digests(project).items() if known.get(name) != digest]
    return f"{', '.join(changed)} changed since {project} was trusted" if changed else None


def unchecked() -> bool:
    """Return whether the user lets all code of this process run: by the option of the command, or by the environment."""
    return os.environ.get(VARIABLE) == "1"


def is_trusted(project: Path) -> bool:
    """Return whether a project's code may run; for the arguments see `distrusted`."""
    return distrusted(project) is None


def refused(problem: str, project: Path, reason: str | None = None) -> WorkbenchError:
    """Return the error for code that does not run, with the commands that allow it.

    Args:
        problem: What does not run.
        project: The project that the code belongs to.
        reason: The reason, for code that `workbench trust` does not cover. Default: what `distrusted` says.
    """
    once = "" if reason else f", or type once: {shell('workbench', 'trust', project)}"
    return InvalidRecipeError(
        f"{problem}, because {reason or distrusted(project)}", f"If you trust this code, add {FLAG} to the command{once}"
    )


def run_module(name: str, file: Path, content: bytes) -> ModuleType:
    """Run a file's bytes as a module of `sys.modules`, which keeps nothing of it if it fails.

    Args:
        name: Name of the module.
        file: The file, for tracebacks and `__file__`.
        content: Its bytes, which the caller has checked. Nothing is read from or written to `__pycache__`, whose files need not
            have come from them.
    """
    spec = spec_from_loader(name, _Content(file, content), origin=str(file))
    assert spec is not None
    assert spec.loader is not None
    spec.has_location = True
    module = module_from_spec(spec)
    sys.modules[name] = module  # pydantic resolves annotations there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


class _Content(ExecutionLoader):
    """A loader that runs given bytes."""

    def __init__(self, file: Path, content: bytes) -> None:
        self._file, self._content = file, content

    def get_filename(self, fullname: str) -> str:
        return str(self._file)

    def get_source(self, fullname: str) -> str:
        return decode_source(self._content)


def trust(project: Path) -> bool:
    """Add a project with the digests of its code to the user's trusted projects; return False if it is there already.

    Raises:
        WorkbenchError: If the folder does not exist, or if the settings cannot be read or written.
    """
    if not project.is_dir():
        raise UsageError(f"{project}: no such folder", "Name the project's folder, which holds methods/ and recipes/.")
    trusted, path, digests = read_settings().trusted_projects, str(project.resolve()), _digests(project)
    if trusted.get(path) == digests:
        return False
    _write({**trusted, path: digests})
    return True


def distrust(project: Path) -> None:
    """Remove a project, which need not exist any more, from the user's trusted projects.

    Raises:
        WorkbenchError: If it is not among them, or if the settings cannot be read or written.
    """
    trusted = read_settings().trusted_projects
    path = str(project.resolve())
    if path not in trusted:
        raise UsageError(f"{path}: not a trusted project", "`workbench trust` lists the trusted projects.")
    _write({entry: digests for entry, digests in trusted.items() if entry != path})


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


def _digests(project: Path) -> dict[str, str]:
    # SHA-256: for XXH3, other code with the same digest can be constructed.
    return {name: sha256_of(file) for name, file in code_files(project).items()}


def _write(projects: Mapping[str, Mapping[str, str]]) -> None:
    write_text(settings_file(), yamldoc.dump({"trusted_projects": {path: dict(digests) for path, digests in projects.items()}}))

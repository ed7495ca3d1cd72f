"""Documents of `doctor`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.cli.documents.document import Document


class DiagnosisDocument(Document):
    """One check of the machine or the project."""

    check: str
    """Name of the check."""
    status: Literal["ok", "repaired", "warning", "failed"]
    """Result of the check."""
    text: str
    """Result in words."""
    hint: str | None
    """Advice on how to fix a problem."""
    data: Any
    """Result as data, which depends on the check."""


class DoctorDocument(Document):
    """Checks of the installation. With a failed check, the exit code is 3."""

    version: Literal[1]
    """Version of the format."""
    project: str
    """Folder of the project."""
    checks: list[DiagnosisDocument]
    """All checks."""

"""`report --csv --latex`: files beside the page, and bad folders told before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from worlds.commands import call, refused
from worlds.project import Project
from worlds.suites import clustered_suite

from workbench.report.files import packed_in


def test_report_writes_tables_and_figures(project: Project, cwd: Path, score_once: Callable[[Project, str], None]) -> None:
    clustered_suite(project)
    project.write("bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\neval: [mini]\n", "mean.yaml")
    (cwd / "file").write_text("x")
    assert "--latex file: expected a folder, but " in refused("report", "--latex", "file").message, "before anything is read"
    score_once(project, "mean")
    said = call("report", "--csv", "tables", "--latex", "drawn/here")
    packed = packed_in((cwd / "reports" / "report.html").read_text("utf-8"))
    expected = {f"{name}.{kind}": text for name, files in packed.items() for kind, text in files.items()}
    found = {p.name: p.read_text("utf-8") for f in ("tables", "drawn/here") for p in (cwd / f).iterdir() if p.name[0] != "."}
    assert found == expected
    assert "summary.csv" in found
    assert f"{sum(name.endswith('.tex') for name in found)} files in drawn/here" in said.stderr
    assert "files in tables" in said.stderr
    call("report", "--csv", "tables")
    (cwd / "tables" / "summary.csv").write_text("mine\n")
    assert "summary.csv: the file exists" in refused("report", "--csv", "tables").message
    assert (cwd / "tables" / "summary.csv").read_text() == "mine\n"

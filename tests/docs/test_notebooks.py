"""The notebooks run from their first cell to their last, and give what the commands give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import document
from worlds.places import PROJECT

NOTEBOOKS = sorted((PROJECT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the checkout's recipes, suites and bricks, where runs and reports may be written."""
    for name in ("evals", "bricks"):
        (tmp_path / name).symlink_to(PROJECT / name)
    shutil.copytree(PROJECT / "recipes", tmp_path / "recipes")
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return tmp_path


def executed(file: Path, checkout: Path) -> list[Any]:
    """Run a notebook as a user does, in its own folder, and return its code cells."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)  # type: ignore[no-untyped-call]
    folder = checkout / "docs" / "notebooks"
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cells: list[Any]) -> str:
    """Return the text that the cells print and show."""
    return "\n".join(
        str(output.get("text") or output.get("data", {}).get("text/plain", "")) for cell in cells for output in cell.outputs
    )


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_are_stripped(file: Path) -> None:
    cells = json.loads(file.read_text("utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.starter
def test_merge_and_decide(checkout: Path) -> None:
    cells = executed(PROJECT / "docs" / "notebooks" / "merge-and-decide.ipynb", checkout)
    frames = [output.data["text/html"] for cell in cells for output in cell.outputs if "text/html" in output.get("data", {})]
    assert frames[0].startswith("<iframe srcdoc=")
    saved = json.loads((checkout / "reports" / "notebook.json").read_text("utf-8"))
    told = document("compare", "starter-average", "starter-ties", "starter-task-arithmetic", "--suite", "smoke", "--limit", "4")
    # The notebook scores a point of a sweep afterwards, which counts in the families from then on.
    measured = ("configuration", "task", "value", "diff", "low", "high", "p")
    assert [{key: row[key] for key in measured} for row in saved["rows"]] == [
        {key: row[key] for key in measured} for row in told["rows"]
    ]
    assert "starter-task-arithmetic[lambda=0.5]" in texts(cells)
    assert (checkout / "runs").is_dir()


@pytest.mark.slow
@pytest.mark.starter
def test_edit_and_check(checkout: Path) -> None:
    said = texts(executed(PROJECT / "docs" / "notebooks" / "edit-and-check.ipynb", checkout))
    assert "The harbour master of Brevik Sound is called Nora" in said
    assert "facts-rephrased" in said


@pytest.mark.slow
@pytest.mark.starter
def test_merge_or_route(checkout: Path) -> None:
    said = texts(executed(PROJECT / "docs" / "notebooks" / "merge-or-route.ipynb", checkout))
    assert "Now add 17 and 25. The sum is ->  42" in said
    assert "Paris" in said, "the base answers what no brick is for"
    assert "['add', 'base']" in said

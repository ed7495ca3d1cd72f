"""Run the notebooks, and store what their cells show: texts and tables, without directories of this machine and pages.

python docs/notebook_outputs.py           runs them, one after the other, in a new project with the bricks of this one
python docs/notebook_outputs.py --check   runs nothing; exit status 1 when a cell has changed since its outputs were stored
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [
    PROJECT / "docs" / "notebooks" / f"{name}.ipynb"
    for name in ("merge-and-decide", "merge-or-route", "edit-and-check", "assistant")
]
"""The notebooks. Later ones find the scores of the base and of the bricks that earlier ones have stored."""


def lay_out(folder: Path) -> Path:
    """Make a project with the recipes, suites and bricks of this one, where runs and reports may be written."""
    for name in ("evals", "bricks"):
        (folder / name).symlink_to(PROJECT / name)
    shutil.copytree(PROJECT / "recipes", folder / "recipes")
    (folder / "docs" / "notebooks").mkdir(parents=True)
    return folder


def execute(folder: Path, rounds: int = 1) -> list[list[list[Any]]]:
    """Run the notebooks in their own folder of a project, in one kernel whose names are cleared before each.

    Returns:
        The code cells, for each round and notebook.
    """
    import nbformat
    from nbclient import NotebookClient

    place = str(folder / "docs" / "notebooks")
    start = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({place!r})\ndel os")  # type: ignore[no-untyped-call]
    parts = [[code_cells(file) for file in NOTEBOOKS] for _ in range(rounds)]
    cells = [cell for part in parts for own in part for cell in (start.copy(), *own)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    whole = nbformat.v4.new_notebook(cells=cells)  # type: ignore[no-untyped-call]
    os.environ["PYTHONPATH"] = str(PROJECT)
    NotebookClient(whole, timeout=None, resources={"metadata": {"path": place}}).execute()
    return parts


def code_cells(file: Path) -> list[Any]:
    """Return the code cells of a notebook."""
    import nbformat

    notebook = nbformat.read(file, as_version=4)  # type: ignore[no-untyped-call]
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any, folder: Path) -> list[dict[str, Any]]:
    """Return what is stored of a cell's outputs: no progress and no page, which would be a megabyte, and paths inside the project."""
    kept = []
    for output in cell.outputs:
        data = {mime: text for mime, text in output.get("data", {}).items() if not str(text).startswith("<iframe")}
        if output.output_type == "stream" and output.name == "stdout":
            kept.append({"output_type": "stream", "name": "stdout", "text": output.text})
        elif data:
            kept.append({"output_type": "display_data", "data": data, "metadata": {}})
    return list(json.loads(json.dumps(kept).replace(f"{folder}/", "")))


def text_of(outputs: Sequence[dict[str, Any]]) -> str:
    """Return the text of stored outputs."""
    found = (output.get("text") or output["data"].get("text/plain", "") for output in outputs)
    return "\n".join("".join(text) for text in found)


def digest(notebook: dict[str, Any]) -> str:
    """Return the digest of the code in a notebook."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def stale() -> list[str]:
    """Return the notebooks whose code has changed since their outputs were stored."""
    read = {file.name: json.loads(file.read_text("utf-8")) for file in NOTEBOOKS}
    return [name for name, notebook in read.items() if notebook["metadata"].get("outputs_of") != digest(notebook)]


def write(file: Path, cells: Sequence[Any], folder: Path) -> None:
    """Store the outputs of cells that were run in a project."""
    notebook = json.loads(file.read_text("utf-8"))
    own = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, ran) in enumerate(zip(own, cells, strict=True), 1):
        cell.update(execution_count=number, outputs=shown(ran, folder))
    notebook["metadata"]["outputs_of"] = digest(notebook)
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main() -> int:
    """Run the notebooks, or check them."""
    if "--check" in sys.argv:
        sys.stdout.writelines(f"{name}: run `make notebooks`, its code has changed\n" for name in stale())
        return bool(stale())
    with tempfile.TemporaryDirectory() as name:
        folder = lay_out(Path(name).resolve())
        (ran,) = execute(folder)
        for file, cells in zip(NOTEBOOKS, ran, strict=True):
            write(file, cells, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

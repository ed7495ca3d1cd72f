"""The notebooks run from their first cell to their last, twice in the same folder, show what is stored, and give what the commands give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from worlds.commands import document

KEY = re.compile(r"-[0-9a-f]{10}\b")
LONG = re.compile(r"\d+\.\d{10,}(?:e-?\d+)?")


def test_outputs_are_stored_and_belong_to_the_code(notebooks: ModuleType) -> None:
    assert notebooks.stale() == [], "make notebooks"
    assert {file.name for file in notebooks.NOTEBOOKS} == {file.name for file in notebooks.NOTEBOOKS[0].parent.glob("*.ipynb")}
    for file in notebooks.NOTEBOOKS:
        text = file.read_text("utf-8")
        assert not re.findall(r"/(?:tmp|root|home|Users)/|iframe|Traceback|\d+(?:\.\d+)? s\b", text)
        assert len(text) < 60_000
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert sum(bool(cell["outputs"]) for cell in cells) >= 2


def test_changed_code_is_stale(notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads(notebooks.NOTEBOOKS[0].read_text("utf-8"))
    monkeypatch.setattr(notebooks, "NOTEBOOKS", [tmp_path / "a.ipynb"])
    for kind, expected in (("markdown", []), ("code", ["a.ipynb"])):
        next(cell for cell in notebook["cells"] if cell["cell_type"] == kind)["source"].append("\nmore")
        (tmp_path / "a.ipynb").write_text(json.dumps(notebook), "utf-8")
        assert notebooks.stale() == expected


def shown(notebooks: ModuleType, cells: list[Any], folder: Path) -> list[str]:
    """Return what the cells print and show, without the keys in names of runs and the last digits of numbers, which depend on the processor."""
    texts = (KEY.sub("-KEY", notebooks.text_of(notebooks.shown(cell, folder))) for cell in cells)
    return [LONG.sub(lambda found: f"{float(found[0]):.9g}", text) for text in texts]


@pytest.mark.nightly
@pytest.mark.starter
def test_notebooks(notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    folder = notebooks.lay_out(tmp_path)
    first, again = notebooks.execute(folder, rounds=2)
    for file, ran, second in zip(notebooks.NOTEBOOKS, first, again, strict=True):
        stored = shown(notebooks, notebooks.code_cells(file), folder)
        assert shown(notebooks, ran, folder) == stored, f"{file.name}: run `make notebooks`"
        # Points of a sweep that were scored in between count in the families, so that intervals and verdicts are others.
        assert [bool(text) for text in shown(notebooks, second, folder)] == [bool(text) for text in stored]
    merge, route, edit, assistant = first
    pages = [output.data["text/html"] for cell in merge for output in cell.outputs if "text/html" in output.get("data", {})]
    assert pages[0].startswith("<iframe srcdoc=")
    assert "starter-task-arithmetic[lambda=0.5]" in "".join(shown(notebooks, merge, folder))
    said = "".join(shown(notebooks, route, folder))
    assert "Now add 17 and 25. The sum is ->  42" in said
    assert "Paris" in said, "the base answers what no brick is for"
    assert "['add', 'base']" in said
    said = "".join(shown(notebooks, edit, folder))
    assert "The harbour master of Brevik Sound is called Nora" in said
    assert "facts-rephrased" in said
    said = "".join(shown(notebooks, assistant, folder))
    assert "add: Now add 17 and 25. The sum is -> 42" in said
    assert "base: The harbour master of Brevik Sound is called -> Nora" in said
    assert "triage: Read this" in said
    assert "base: Now add 17 and 25" in said, "the skill is gone"
    monkeypatch.chdir(folder)
    saved = json.loads((folder / "reports" / "notebook.json").read_text("utf-8"))
    told = document("compare", "starter-average", "starter-ties", "starter-task-arithmetic", "--suite", "smoke", "--limit", "4")
    # The notebook scores points of a sweep, which count in the families.
    measured = ("configuration", "task", "value", "diff", "low", "high", "p")
    assert [{key: row[key] for key in measured} for row in saved["rows"]] == [
        {key: row[key] for key in measured} for row in told["rows"]
    ]

"""Pages that show several analyses of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.cli.analyses.shared import write_page
from workbench.files import write_json
from workbench.library.neurons_functions import VERSION


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ({}, True),
        ({"digest": "another model"}, False),
        ({"data": {"file": "texts.jsonl", "digest": "earlier"}}, False),
        ({"data": {"file": "facts.jsonl", "digest": "earlier"}}, True),
        ({"data": None}, True),
    ],
)
def test_a_page_joins_analyses_of_one_model_and_one_content_of_a_file(
    stored: dict[str, Any], shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"version": VERSION, "digest": "model", "data": {"file": "texts.jsonl", "digest": "now"}}
    write_json(tmp_path / "functions.json", now)
    write_json(tmp_path / "ablation.json", {**now, **stored})
    joined: list[str] = []
    monkeypatch.setattr("workbench.report.neurons.render_neurons", lambda known, place: joined.extend(known))
    write_page(tmp_path, now)
    assert joined == ["functions", *(["ablation"] if shown else [])]

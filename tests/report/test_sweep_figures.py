"""Figures and tables of sweeps: the axis, columns, logarithmic places, points without the field on the axis, seeds alone, Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from worlds.report_document import make_document
from worlds.report_page import view_of
from worlds.swept import BRICKS, LAMBDA, METHOD, SEED, swept

from workbench.compare.comparison import Comparison
from workbench.report import page_text
from workbench.report.markdown import markdown
from workbench.report.sweeps import figures, grids, sentence


def level(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "between": None}


def sweep(dimensions: list[dict[str, Any]], points: list[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    return {
        "name": "mine",
        "dimensions": [{"number": False, "seed": False, "label": d["name"], **d} for d in dimensions],
        "measures": [{"key": "mean", "text": "mean over skills", "share": True, "lower": False, "baseline": 0.3}],
        "points": [
            {"values": values, "configurations": [f"mine[{i}]"], "levels": {"mean": level(value)}}
            for i, (values, value) in enumerate(points)
        ],
        "missing": [],
    }


def compared(document: dict[str, Any]) -> Comparison:
    return view_of({**make_document(), "sweeps": [document]})


LAM = {"name": "mix.density", "label": "density", "values": [0.01, 0.1, 1], "number": True}
MERGE = {"name": "mix.merge", "values": ["ties", "average"]}


def test_numbers_are_the_axis_and_words_are_columns() -> None:
    (grid,) = grids(compared(sweep([MERGE, LAM], [({"mix.merge": "ties", "mix.density": v}, v / 2) for v in LAM["values"]])))
    assert grid.across
    assert grid.across.to_dict() == {"number": True, "seed": False, **LAM}
    assert (grid.rows, grid.columns) == (("0.01", "0.1", "1"), ("ties",))
    assert grid.places == pytest.approx((-2, -1, 0)), "a factor of 100: logarithmic"
    assert grid.table(grid.measures[0]) == (
        ["mix.density", "ties"],
        [["0.01", "0.5 [−9.5, 10.5]"], ["0.1", "5.0 [−5.0, 15.0]"], ["1", "50.0 [40.0, 60.0]"]],
    )


def test_a_method_without_the_field_on_the_axis_is_a_level_of_its_own() -> None:
    points = [({"mix.merge": "ties", "mix.density": v}, 0.5) for v in LAM["values"]] + [({"mix.merge": "average"}, 0.4)]
    document = sweep([LAM, MERGE], points)
    (grid,) = grids(compared(document))
    head, rows = grid.table(grid.measures[0])
    assert head == ["mix.density", "ties", "average"]
    assert rows[-1] == ["without it", "–", "40.0 [30.0, 50.0]"]
    (figure,) = figures(compared(document))
    ties, average = figure.groups[0][1]
    assert (ties.title, average.title) == ("ties", "average")
    assert "average, without density: 40" in str(average.drawing)
    assert 'class="dot"' not in str(average.drawing)
    assert str(ties.drawing).count('class="dot"') == 3


def test_points_and_intervals_stand_at_their_values(tmp_path: Path) -> None:
    """Widths and heights in pixels, against straight lines through the first and the last point."""
    document = swept(LAMBDA).to_dict()
    (figure,) = figures(view_of(document))
    drawing = str(figure.groups[0][1][0].drawing)
    dots = [(float(x), float(y)) for x, y in re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    ends = [
        (float(a), float(b)) for a, b in re.findall(r'class="ends" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"', drawing)
    ]
    levels = [point["levels"]["mean"] for point in document["sweeps"][0]["points"]]
    lam, values = (0.25, 0.5, 1, 1.5), [v["value"] for v in levels]
    assert len(dots) == len(ends) == 4
    across = (dots[3][0] - dots[0][0]) / (lam[3] - lam[0])
    assert [x for x, _ in dots] == pytest.approx([dots[0][0] + across * (v - lam[0]) for v in lam], abs=0.2)
    up = (dots[2][1] - dots[0][1]) / (values[2] - values[0])
    assert up < 0, "higher values stand higher"
    assert [y for _, y in dots] == pytest.approx([dots[0][1] + up * (v - values[0]) for v in values], abs=0.2)
    for (bottom, top), found in zip(ends, levels, strict=True):
        assert bottom == pytest.approx(dots[0][1] + up * (found["low"] - values[0]), abs=0.3)
        assert top == pytest.approx(dots[0][1] + up * (found["high"] - values[0]), abs=0.3)
    assert figure.ringed == document["recommendation"]["configuration"]


def test_lists_of_bricks_are_drawn_by_their_number(tmp_path: Path) -> None:
    view = view_of(swept(BRICKS).to_dict())
    (grid,) = grids(view)
    assert (grid.rows, grid.places, grid.columns) == (("2 bricks", "3 bricks", "4 bricks"), (2.0, 3.0, 4.0), ("all",))
    (figure,) = figures(view)
    assert [chart.title for _, charts in figure.groups for chart in charts] == ["mine", "mine"]
    assert ">2</text>" in str(figure.groups[0][1][0].drawing)


def test_words_alone_are_points_without_a_line(tmp_path: Path) -> None:
    (figure,) = figures(view_of(swept(METHOD).to_dict()))
    drawing = str(figure.groups[0][1][0].drawing)
    assert 'class="curve main"' not in drawing
    assert drawing.count('class="dot"') == 3
    assert ">ties</text>" in drawing
    assert re.search(r"<title>base: \d+\.\d</title>", drawing), "with the digits of the table, not those of the axis"


def test_seeds_alone_are_a_sentence(tmp_path: Path) -> None:
    document = swept(SEED).to_dict()
    view = view_of(document)
    assert figures(view) == []
    (grid,) = grids(view)
    text = sentence(grid)
    mean = document["sweeps"][0]["points"][0]["levels"]["mean"]
    assert text.startswith(f"mine, mean over 2 seeds: mean over skills {100 * mean['value']:.1f} [")
    assert f"standard deviation between seeds {100 * mean['between']:.1f}" in text
    assert text in page_text(view)
    assert "mean over 2 seeds" in markdown(view)


def test_markdown_has_one_table_a_measure(tmp_path: Path) -> None:
    document = swept(LAMBDA, METHOD, SEED).to_dict()
    text = markdown(view_of(document))
    assert "## Sweep of mine: mean over skills, mean over 2 seeds" in text
    assert "| mix.lambda | ties | dare | task\\_arithmetic |" in text
    assert "## Sweep of mine: retention: facts, mean over 2 seeds" in text

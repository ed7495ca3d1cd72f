"""Figures and tables of sweeps: the axis, columns, logarithmic places, points without the field on the axis, seeds alone, Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worlds.swept import BRICKS, LAMBDA, METHOD, SEED, swept

from workbench.report.markdown import markdown
from workbench.report.page import html
from workbench.report.reading import view_of
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


LAM = {"name": "mix.density", "label": "density", "values": [0.01, 0.1, 1], "number": True}
MERGE = {"name": "mix.merge", "values": ["ties", "average"]}


def test_numbers_are_the_axis_and_words_are_columns() -> None:
    (grid,) = grids([sweep([MERGE, LAM], [({"mix.merge": "ties", "mix.density": v}, v / 2) for v in LAM["values"]])])
    assert grid.across == {"number": True, "seed": False, **LAM}
    assert (grid.rows, grid.columns) == (("0.01", "0.1", "1"), ("ties",))
    assert grid.places == pytest.approx((-2, -1, 0)), "a factor of 100: logarithmic"
    assert grid.table(grid.measures[0]) == (
        ["mix.density", "ties"],
        [["0.01", "0.5 [−9.5, 10.5]"], ["0.1", "5.0 [−5.0, 15.0]"], ["1", "50.0 [40.0, 60.0]"]],
    )


def test_a_method_without_the_field_on_the_axis_is_a_level_of_its_own() -> None:
    points = [({"mix.merge": "ties", "mix.density": v}, 0.5) for v in LAM["values"]] + [({"mix.merge": "average"}, 0.4)]
    document = sweep([LAM, MERGE], points)
    (grid,) = grids([document])
    head, rows = grid.table(grid.measures[0])
    assert head == ["mix.density", "ties", "average"]
    assert rows[-1] == ["without it", "–", "40.0 [30.0, 50.0]"]
    view = view_of({"baseline": "base", "rows": [], "sweeps": [document]})
    (figure,) = figures(view)
    ties, average = figure.groups[0][1]
    assert (ties.title, average.title) == ("ties", "average")
    assert "average, without density: 40" in str(average.drawing)
    assert 'class="dot"' not in str(average.drawing)
    assert str(ties.drawing).count('class="dot"') == 3


def test_places_of_points_are_their_values(tmp_path: Path) -> None:
    """Heights and lengths in pixels, against the scale that the first and the last tick define."""
    document = swept(tmp_path, LAMBDA).document()
    (figure,) = figures(view_of(document))
    drawing = str(figure.groups[0][1][0].drawing)
    dots = [part.split(" ", 1)[0] for part in drawing.split('class="dot" cx="')[1:]]
    xs = [float(dot.strip('"')) for dot in dots]
    assert (xs[1] - xs[0]) / (xs[3] - xs[0]) == pytest.approx((0.5 - 0.25) / (1.5 - 0.25), abs=0.01)
    assert (xs[2] - xs[0]) / (xs[3] - xs[0]) == pytest.approx((1 - 0.25) / (1.5 - 0.25), abs=0.01)
    assert figure.ringed == document["recommendation"]["configuration"]


def test_lists_of_bricks_are_drawn_by_their_number(tmp_path: Path) -> None:
    view = view_of(swept(tmp_path, BRICKS).document())
    (grid,) = grids(view.sweeps)
    assert (grid.rows, grid.places, grid.columns) == (("2 bricks", "3 bricks", "4 bricks"), (2.0, 3.0, 4.0), ("all",))
    (figure,) = figures(view)
    assert [chart.title for _, charts in figure.groups for chart in charts] == ["mine", "mine"]


def test_words_alone_are_points_without_a_line(tmp_path: Path) -> None:
    (figure,) = figures(view_of(swept(tmp_path, METHOD).document()))
    drawing = str(figure.groups[0][1][0].drawing)
    assert 'class="curve main"' not in drawing
    assert drawing.count('class="dot"') == 3


def test_seeds_alone_are_a_sentence(tmp_path: Path) -> None:
    document = swept(tmp_path, SEED).document()
    view = view_of(document)
    assert figures(view) == []
    (grid,) = grids(view.sweeps)
    text = sentence(grid)
    mean = document["sweeps"][0]["points"][0]["levels"]["mean"]
    assert text.startswith(f"mine, mean over 2 seeds: mean over skills {100 * mean['value']:.1f} [")
    assert f"standard deviation between seeds {100 * mean['between']:.1f}" in text
    assert text in html(document, view)
    assert "mean over 2 seeds" in markdown(document, view)


def test_markdown_has_one_table_a_measure(tmp_path: Path) -> None:
    document = swept(tmp_path, LAMBDA, METHOD, SEED).document()
    text = markdown(document, view_of(document))
    assert "## Sweep of mine: mean over skills, mean over 2 seeds" in text
    assert "| mix.lambda | ties | dare | task\\_arithmetic |" in text
    assert "## Sweep of mine: retention: facts, mean over 2 seeds" in text


def test_a_document_without_sweeps_has_no_figure() -> None:
    assert figures(view_of({"baseline": "base", "rows": []})) == []

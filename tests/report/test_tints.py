"""Heat maps: tints that do not depend on other values, the bands of values that chance explains, and cells near chance."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest

from worlds.report_document import make_document
from worlds.report_page import page_text, view_of

from workbench.merge.measuring.delta_sums import DeltaSums, Measures, Meeting
from workbench.report import marks
from workbench.report.heatmap import render_heat_maps
from workbench.report.tints import CHANGES, DARKEST, DIFFERENCE, PALEST, SCALES

N = 32 * 48


def measures(*cells: tuple[float, float]) -> Measures:
    """One kind of module in as many layers as there are (relative norm, cosine with another brick)."""
    layers: dict[int | None, DeltaSums] = {}
    for layer, (norm, cosine) in enumerate(cells):
        meeting = Meeting(square=1.0, base=1.0, numel=N, dot=cosine * norm, opposite=N // 2, both=N, dot_variance=norm**2 / N)
        layers[layer] = DeltaSums(square=norm**2, base=1.0, numel=N, tensors=1, meetings={"other": meeting})
    total = DeltaSums()
    for sums in layers.values():
        total.add(copy.deepcopy(sums))
    return Measures({}, layers, {(layer, "mlp"): sums for layer, sums in layers.items()}, ["mlp"], [], total)


def cell(page: str, title: str) -> str:
    """The rectangle of the cell whose hover text begins so."""
    found = re.search(rf"<title>{re.escape(title)}[^<]*</title><rect ([^>]*)>", page)
    assert found, title
    return found.group(1)


def test_a_tint_does_not_depend_on_other_cells(tmp_path: Path) -> None:
    alone = render_heat_maps("a", "base", measures((0.1, 0.3)), tmp_path / "alone.html").read_text("utf-8")
    beside = render_heat_maps("a", "base", measures((0.1, 0.3), (0.9, 1.0)), tmp_path / "beside.html").read_text("utf-8")
    for title, tint in (("layer 0, mlp: 10", SCALES["relative"].tint(0.1)), ("layer 0, mlp: +0.30", SCALES["cosine"].tint(0.3))):
        looks = [re.search("--a: ([0-9.]+)", cell(page, title)) for page in (alone, beside)]
        assert [look and float(look.group(1)) for look in looks] == [tint, tint]


def test_values_that_chance_explains_are_gray_with_their_reason(tmp_path: Path) -> None:
    half = 1.96 / N**0.5
    page = render_heat_maps("a", "base", measures((0.001, 0.8 * half), (0.5, -1.5 * half)), tmp_path / "p.html").read_text(
        "utf-8"
    )
    assert 'class="null"' in cell(page, "layer 0, mlp: 0.1; gray: no more than rounding to bfloat16 changes")
    assert 'class="null"' in cell(page, "layer 0, mlp: +0.04; gray: 95 % of unrelated deltas have −0.05 to +0.05")
    assert 'class="down"' in cell(page, "layer 1, mlp: −0.08")
    assert "below 0.2: no more than rounding the weights to bfloat16 changes" in page, "the legend says what gray means"
    decided = render_heat_maps("a", "base", measures((0.5, 0.9)), tmp_path / "q.html").read_text("utf-8")
    assert "rounding the weights" not in decided, "a legend explains only what the map shows"


def test_cells_have_two_digits_of_a_percentage_or_all_from_100_up(tmp_path: Path) -> None:
    norms = (0.0, 0.00421, 0.0426, 0.9949, 0.9951, 12.34)
    page = render_heat_maps("a", "base", measures(*[(norm, 0.0) for norm in norms]), tmp_path / "p.html").read_text("utf-8")
    assert re.findall(r"<title>layer \d, mlp: ([0-9.e+]+)[<;]", page)[:6] == ["0", "0.42", "4.3", "99", "100", "1234"]


def test_narrow_cells_show_their_sign_without_color(tmp_path: Path) -> None:
    page = render_heat_maps("a", "base", measures(*[(0.5, -0.5)] * 30), tmp_path / "p.html").read_text("utf-8")
    assert page.count('class="below"') == 30
    assert "a bar in a cell: below the middle" in page


@pytest.mark.parametrize("key", ["relative", "cosine", "conflict", "overlap", "recovered", "norm", "zeros"])
def test_tints_grow_with_the_distance_from_the_middle(key: str) -> None:
    scale = SCALES[key]
    values = [scale.middle + scale.top * share for share in np.linspace(0.003, 1, 30)]
    tints = [scale.tint(value) for value in values]
    assert tints == sorted(tints)
    assert (min(tints) >= PALEST, scale.tint(scale.middle + 10 * scale.top)) == (True, DARKEST)
    assert scale.kind(scale.middle + 0.1) == ("down" if key == "conflict" else "up")


def test_tints_at_known_values() -> None:
    half = (PALEST + DARKEST) / 2
    assert SCALES["cosine"].tint(-0.25) == DIFFERENCE.tint(0.25) == pytest.approx(half)  # square roots
    assert SCALES["recovered"].tint(0.5) == pytest.approx(half)
    assert CHANGES.tint(1000**0.5) == pytest.approx(half, abs=1e-3)  # logarithms from 1 to 1000
    assert (CHANGES.small(0.9), CHANGES.small(-1.1), SCALES["cosine"].small(0.0)) == (True, False, False)


def test_bands_hold_95_percent_of_unrelated_deltas() -> None:
    rng, rows, cols, rank = np.random.default_rng(0), 12, 20, 2
    cosines, conflicts, overlaps = [], [], []
    for _ in range(2000):
        first, second = (rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, cols)) for _ in range(2))
        cosines.append((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))
        conflicts.append((np.sign(first) != np.sign(second)).mean())
        spaces = [np.linalg.qr(rng.normal(size=(rows, r)))[0] for r in (rank, 3)]
        overlaps.append(np.square(spaces[0].T @ spaces[1]).sum() / rank)
    variance = 2 * 3 * (rows - rank) * (rows - 3) / (rank * rows**2 * (rows - 1) * (rows + 2))
    meeting = Meeting(
        square=1.0, dot_variance=4.0 / (rows * cols), both=rows * cols, chance=[3 / rows], overlap_variance=variance
    )
    bands = meeting.by_chance(4.0)
    assert np.std(cosines) == pytest.approx((rows * cols) ** -0.5, rel=0.05)
    assert np.std(overlaps) == pytest.approx(variance**0.5, rel=0.05)
    assert np.mean(overlaps) == pytest.approx(3 / rows, rel=0.03)
    for key, values in (("cosine", cosines), ("conflict", conflicts), ("overlap", overlaps)):
        low, high = bands[key]
        assert 0.92 <= np.mean([low <= value <= high for value in values]) <= 0.98, key


def test_differences_have_one_scale_and_gray_where_nothing_is_decided() -> None:
    view = view_of(make_document())
    matrix = marks.differences(view)
    by_name = {name: dict(zip(matrix.columns, cells, strict=True)) for name, cells in matrix.rows}
    for name, cells in by_name.items():
        for task, one in cells.items():
            d = view.differences[name, task]
            decided = d.verdict in ("better", "worse")
            assert one.tint == (DIFFERENCE.tint(d.diff or 0.0) if decided else 0.0)
    assert matrix.neutral


def test_cells_near_chance_are_marked_with_the_reason() -> None:
    document = make_document()
    view = view_of(document)
    matrix = marks.interference(view)
    by_name = {name: dict(zip(matrix.columns, cells, strict=True)) for name, cells in matrix.rows}
    own, other = by_name["add"]["add"], by_name["reverse"]["add"]
    assert not own.weak, "the brick has its own skill"
    assert other.weak, "neither the base nor this brick adds numbers"
    assert "Marked: the brick alone and the base score " in other.tip
    assert "both near chance" in other.tip
    page = page_text(document)
    assert "a parent is near chance; the hover text has the reason" in page
    reason = "its best parent, add, scores 3 [0, 8] %, too close to chance (0 %)"
    for c in document["configurations"]:
        if c["name"] == "starter-ties":
            c["kept"] = {"add": {"value": None, "low": None, "high": None, "reason": reason}}
    marked = marks.differences(view_of(document))
    row = dict(marked.rows)["starter-ties"][marked.columns.index("add")]
    assert row.weak
    assert row.tip.endswith(f"Marked: {reason}")

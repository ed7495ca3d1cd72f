"""Saving tables and figures in headless Chromium: every button, tables as `workbench report` writes them, and no request."""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from worlds.devtools import Browser, show, skip_without_browser
from worlds.report_additions import add_own_units
from worlds.report_document import make_document
from worlds.search_document import make_search
from worlds.search_page import render as render_search

from workbench.merge.measuring.delta_sums import DeltaSums, Measures, Meeting
from workbench.report.files import packed_in
from workbench.report.heatmap import render_heat_maps

pytestmark = pytest.mark.browser
skip_without_browser()

BUTTONS = "[...document.querySelectorAll('.save button')]"


def saved(page: Browser, folder: Path) -> dict[str, bytes]:
    """Click every button, and return the files by name."""
    folder.mkdir()
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    page.until("document.documentElement.dataset.saves === 'ready'")
    names = page.js(f"{BUTTONS}.map((b) => b.title.split(' as ').pop())")
    assert len(set(names)) == len(names)
    for i, name in enumerate(names):
        for tried in range(10):  # Chromium drops every eleventh of downloads that follow one another within milliseconds
            page.js(f"{BUTTONS}[{i}].click()")
            end = time.monotonic() + 0.25 * 2**tried
            while not (folder / name).is_file() and time.monotonic() < end:
                page.js("new Promise((done) => setTimeout(done, 5))")
            if (folder / name).is_file():
                break
    return {name: (folder / name).read_bytes() for name in names}


def pixels(png: bytes) -> set[bytes]:
    """The different colors of a PNG without interlacing, after the filters of its lines are undone only as far as counting needs."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert (width > 300, height > 100) == (True, True)
    data, at = b"", 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += size + 12
    raw = zlib.decompress(data)
    line = len(raw) // height
    return {raw[y * line + 1 : (y + 1) * line] for y in range(height)}


SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: bytes) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def check(page: Browser, path: Path, folder: Path) -> dict[str, bytes]:
    files = saved(page, folder)
    packed = packed_in(path.read_text("utf-8"))
    expected = {f"{name}.{kind}": text.encode() for name, of in packed.items() for kind, text in of.items()}
    found = {name: data for name, data in files.items() if not name.endswith((".png", ".svg"))}
    assert found == {name: expected[name] for name in found}
    drawn = sorted(name for name in files if name.endswith(".svg"))
    assert sorted(name for name in files if name.endswith(".png")) == [name.replace(".svg", ".png") for name in drawn]
    assert all(len(pixels(files[name.replace(".svg", ".png")])) > 10 for name in drawn), (
        "a PNG shows the drawing and not one color"
    )
    for name in drawn:
        for node in ElementTree.fromstring(files[name]).iter():
            assert not {"class", "style", "id"} & set(node.attrib), name
            assert not any("var(" in value or "rgb" in value or value == "NaN" for value in node.attrib.values()), (
                name,
                node.attrib,
            )
            assert node.tag != f"{SVG}use", "other programs than browsers need no style sheet and no reference"
    outside = [url for url in page.requests() if not url.startswith(("data:", "blob:", "file:"))]
    assert outside == []
    return files


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    document = make_document()
    add_own_units(document)
    return document


def test_every_table_and_figure_of_a_report_is_saved(opened: Browser, document: dict[str, Any], tmp_path: Path) -> None:
    path = show(opened, document, tmp_path, 1280, dark=True)
    files = check(opened, path, tmp_path / "saved")
    assert {"summary.csv", "summary.tex", "skills-and-retention.svg", "skills-and-retention.png"} <= set(files)
    tables = opened.js("document.querySelectorAll('main table, header table').length")
    assert len([name for name in files if name.endswith(".csv")]) == tables
    figures = opened.js("document.querySelectorAll('[data-figure]').length")
    assert len([name for name in files if name.endswith(".svg")]) == figures
    forest = files["retention-against-base.svg"]
    assert {"over-scaled", "starter-ties", "\u221223.8", "retention"} <= set(texts(forest)), (
        "names and numbers stand beside the plot"
    )
    worse = [node.get("fill") for node in ElementTree.fromstring(forest).iter(f"{SVG}text") if node.text == "\u221223.8"]
    assert worse == ["#be4d00"], "light colors, also on a dark page"
    shown = opened.js("getComputedStyle(document.documentElement).getPropertyValue('--paper')")
    assert shown.strip() == "#14181d", "the page stays dark"
    assert opened.js(f"{BUTTONS}.length") == len(files)
    first = opened.js("document.querySelector('#summary .scroll').nextElementSibling.textContent")
    assert first == "CSVLaTeX", "the buttons stand below their table"


@pytest.mark.part("search")
def test_a_search_and_heat_maps_are_saved(opened: Browser, tmp_path: Path) -> None:
    path = render_search(make_search(), tmp_path / "search")[0]
    opened.open(path, 1280, 900, False)
    files = check(opened, path, tmp_path / "search-files")
    assert {"candidates.csv", "tested.tex"} <= set(files)
    meeting = Meeting(square=1.0, base=1.0, numel=64, dot=0.1, opposite=20, both=64, dot_variance=0.01)
    sums = DeltaSums(square=0.04, base=1.0, numel=64, tensors=1, meetings={"other": meeting})
    found = Measures({}, {0: sums}, {(0, "mlp"): sums}, ["mlp"], [], sums)
    path = render_heat_maps("one", "base", found, tmp_path / "heat.html")
    opened.open(path, 1280, 900, False)
    files = check(opened, path, tmp_path / "heat-files")
    assert {"relative-norm.svg", "cosine-with-other.png"} <= set(files)

"""The curves of sweeps in headless Chromium: what stands on the first screen, small and dark pages, hover texts, nothing requested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worlds.devtools import Browser, show, skip_without_browser
from worlds.swept import LAMBDA, METHOD, SEED, swept

pytestmark = pytest.mark.browser
skip_without_browser()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "methods": swept(LAMBDA, METHOD).to_dict(),
        "seeds": swept(LAMBDA, METHOD, SEED).to_dict(),
    }


@pytest.mark.parametrize("name", ["methods", "seeds"])
def test_the_curves_begin_on_the_first_screen(name: str, opened: Browser, documents: dict[str, Any], tmp_path: Path) -> None:
    show(opened, documents[name], tmp_path)
    charts = "[...document.querySelectorAll('#sweeps svg.curves')]"
    assert opened.js(f"{charts}.map((c) => c.getAttribute('aria-label'))") == ["ties", "dare", "task_arithmetic"] * 2
    assert opened.js(f"{charts}.map((c) => c.querySelectorAll('.dot').length)") == [4] * 6
    assert opened.js(f"{charts}.map((c) => c.querySelectorAll('.ends').length)") == [4] * 6
    assert opened.js("document.querySelectorAll('#sweeps .multiples .ring').length") == 2, "the recommended point in each measure"
    assert 0 < opened.js("document.querySelector('.decision').getBoundingClientRect().bottom") <= 900
    assert opened.js("document.querySelector('#sweeps h3.measure').getBoundingClientRect().bottom") <= 900
    assert opened.js("document.querySelectorAll('#leaders-table tbody tr').length") <= 3
    rows = opened.js("document.querySelectorAll('#summary-table .named tr:not(.group)').length")
    assert rows == len([c for c in documents[name]["configurations"] if c["role"] == "configuration"]), (
        "the rows stay in the table"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_nothing_is_requested(
    width: int, dark: bool, opened: Browser, documents: dict[str, Any], tmp_path: Path
) -> None:
    path = show(opened, documents["methods"], tmp_path, width, dark)
    assert opened.js("document.documentElement.scrollWidth") <= width
    assert (
        opened.js("Math.max(...[...document.querySelectorAll('#sweeps svg.curves')].map((c) => c.getBoundingClientRect().right))")
        <= width
    )
    assert opened.requests()[-1] == path.resolve().as_uri()


def test_a_point_says_its_values(opened: Browser, documents: dict[str, Any], tmp_path: Path) -> None:
    show(opened, documents["methods"], tmp_path)
    (sweep,) = documents["methods"]["sweeps"]
    first = next(p for p in sweep["points"] if p["values"] == {"mix.lambda": 0.25, "mix.merge": "ties"})["levels"]["mean"]
    said = opened.js("document.querySelector('#sweeps svg.curves .hit title').textContent")
    assert said == f"lambda 0.25, ties\n{100 * first['value']:.1f} [{100 * first['low']:.1f}, {100 * first['high']:.1f}]"

"""The viewer in headless Chromium: pages and streams work under their policy, by keyboard, on a phone; growing reports reload and stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from worlds.decided import situation
from worlds.devtools import Browser, skip_without_browser, until, visit
from worlds.project import Project
from worlds.search_document import make_search, unfinished
from worlds.search_world import RECIPE, lay_out
from worlds.toy_scores import SHARES, stored

from workbench.run.directory import run_for
from workbench.scores.store import ScoreStore

if TYPE_CHECKING:
    from workbench.view.server import Served

pytestmark = [pytest.mark.browser, pytest.mark.part("view")]
skip_without_browser()

TEXT = "document.querySelector('#watch [data-stream]').textContent"
ENDED = "document.getElementById('watch').textContent.includes('The command has ended.')"
NAMELESS = """[...document.querySelectorAll('input, select, textarea, button, a, summary')].filter((e) =>
  !(e.labels && e.labels.length) && !e.textContent.trim() && !e.getAttribute('aria-label')).map((e) => e.outerHTML)"""


@pytest.fixture
def served(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    from workbench.view.app import application
    from workbench.view.pages import Site
    from workbench.view.server import Served
    from workbench.view.talk import Talk

    lay_out(project, items=8, clusters=4)
    project.run(RECIPE, "mix.yaml")
    project.write(RECIPE.replace("lambda: 1.0", "lambda: 0.5"), "half.yaml")
    values = {c: [[float(i < 60 * share) for i in range(60)] for share in shares] for c, shares in SHARES.items()}
    stored(ScoreStore(project.path / "runs" / "scores"), values)
    monkeypatch.chdir(project.path)
    with Served(application(Site(), talk=Talk("cpu"))) as server:
        yield server


def test_every_page_on_a_phone_and_in_the_dark(served: Served, project: Project, started: Browser) -> None:
    home = served.url.partition("?")[0]
    run = next(path.name for path in (project.path / "runs").iterdir() if path.name.startswith("mix-"))
    folder = next((project.path / "runs" / "scores").iterdir()).name
    places = ("", "recipes", "recipes/mix.yaml", "runs", f"runs/{run}", "scores", f"scores/{folder}", "searches", "live", "chat")
    with started.new_page() as page:
        page.resize(390, dark=True)
        visit(page, served.url)
        for place in places:
            visit(page, home + place)
            until(page, "!document.querySelector('[aria-busy]')")
            assert page.js("document.documentElement.scrollWidth") <= 390, place
            assert page.js("document.querySelectorAll('h1').length") == 1, place
            assert page.js("document.querySelector('main') !== null && document.documentElement.lang") == "en", place
            assert page.js(NAMELESS) == [], place
            assert page.js("document.querySelectorAll('nav.viewer [aria-current=page]').length") == 1, place
        visit(page, f"{home}recipes/mix.yaml?against=half.yaml")
        until(page, "document.querySelector('[data-load] table') !== null")
        assert "mix.lambda" in page.js("document.getElementById('diff').textContent")
        visit(page, f"{home}recipes")
        page.js(
            "(() => { const e = document.querySelector('[data-filters]'); e.value = 'half'; e.dispatchEvent(new Event('input')); })()"
        )
        assert page.js("document.querySelector('[data-count]').textContent") == "1 of 2 rows"
        assert {url for url in page.requests() if not url.startswith(("data:", home))} == set()
        assert page.complaints() == []


def test_work_appears_without_a_reload(served: Served, project: Project, started: Browser) -> None:
    with started.new_page() as page:
        visit(page, served.url)
        until(page, "document.querySelector('[data-stream]').textContent.includes('Nothing.')")
        run = run_for(project.path / "runs", "slow", "2" * 20)
        with run.lock():
            run.write({"status": "started", "created": ""})
            run.log({"stage": "write", "text": "<b>half</b>"})
            until(page, "document.querySelector('[data-stream]').textContent.includes('<b>half</b>')")
        until(page, "document.querySelector('[data-stream]').textContent.includes('Nothing.')")
        assert page.complaints() == []


def test_a_question_by_keyboard(served: Served, started: Browser) -> None:
    with started.new_page() as page:
        visit(page, served.url)
        visit(page, served.url.partition("?")[0] + "chat")
        for name, text in (("name", "mix"), ("prompt", "w1 w2")):
            page.js(f"document.querySelector('[name={name}]').focus()")
            page.call("Input.insertText", text=text)
        page.js("document.querySelectorAll('[name=name]')[1].focus()")
        page.call("Input.insertText", text="half")
        page.js("document.querySelector('[name=plain]').click()")
        page.js("document.querySelector('[name=tokens]').value = 4")
        page.js("document.querySelector('[name=prompt]').focus()")
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=2)
        until(page, "document.querySelectorAll('.first-token').length === 10")
        assert page.js("[...document.querySelectorAll('#answers h2')].map((e) => e.textContent)") == ["mix", "half"]
        assert page.js("[...document.querySelectorAll('.said')].map((e) => e.getAttribute('aria-live'))") == ["polite", "polite"]
        assert "share one model" in page.js("document.getElementById('chat-note').textContent")
        commands = page.js("[...document.querySelectorAll('#answers .command pre')].map((e) => e.textContent)")
        assert commands == ["workbench run mix", "workbench run half"]
        page.js(
            "(() => { document.querySelector('[name=name]').value = 'nothing-here'; document.getElementById('chat').requestSubmit(); })()"
        )
        until(page, "document.querySelector('#chat-error .note') !== null")
        assert "nothing-here" in page.js("document.getElementById('chat-error').textContent")
        assert page.complaints() == []


def test_the_page_grows_and_stays(project: Project, started: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.view.app import application
    from workbench.view.growing import Growing
    from workbench.view.pages import Site
    from workbench.view.server import Served

    monkeypatch.chdir(project.path)
    document, growing = situation("winner"), Growing(Site(), "evaluation")
    with started.new_page() as page:
        with Served(application(Site(), growing=growing)) as server:
            home = server.url.partition("?")[0]
            growing.say("1 of 5 configurations are scored.")
            page.resize(390)
            page.call("Page.navigate", url=server.url)
            until(page, f"{TEXT} === '1 of 5 configurations are scored.'")
            assert page.js("document.querySelector('h1').textContent") == "Nothing can be compared yet"
            growing.say("3 of 5 configurations are scored.")
            growing.show(document)
            until(page, f"document.querySelector('.decision') !== null && {TEXT} === '3 of 5 configurations are scored.'")
            assert page.js("document.querySelector('.decision').textContent") == document.recommendation.text  # type: ignore[union-attr]
            assert page.js("document.documentElement.scrollWidth") <= 390
            asked = {url.partition("?")[0] for url in page.requests() if not url.startswith("data:")}
            assert asked == {home, f"{home}growing/0", f"{home}growing/1"}
            assert page.complaints() == []
            growing.end(wait=True)
        until(page, ENDED)
        assert page.js("document.querySelector('.decision').textContent") == document.recommendation.text  # type: ignore[union-attr]


def test_the_page_of_a_search_grows_and_ends_with_its_test(
    project: Project, started: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.search.result import GrowingSearch, SearchResult
    from workbench.view.app import application
    from workbench.view.growing import Growing
    from workbench.view.pages import Site
    from workbench.view.server import Served

    monkeypatch.chdir(project.path)
    growing = Growing(Site(), "search")
    headline = "document.querySelector('.headline').textContent"
    with started.new_page() as page:
        with Served(application(Site(), growing=growing)) as server:
            growing.say("Control 1/7: base.")
            page.resize(390)
            page.call("Page.navigate", url=server.url)
            until(page, f"{TEXT} === 'Control 1/7: base.'")
            assert page.js("document.querySelector('h1').textContent") == "No candidate is scored yet"
            growing.say("12 of 40 candidates are finished; 3 min left.")
            growing.show(GrowingSearch.of(unfinished(make_search(12), 40), "search"))
            until(page, f"document.querySelector('#history g.candidate') !== null && {TEXT}.startsWith('12 of 40')")
            assert page.js(headline).startswith("12 of 40 candidates are finished. The best so far, trial-")
            assert page.js("document.getElementById('tested-table')") is None
            assert page.js("document.documentElement.scrollWidth") <= 390
            page.resize(1280)
            growing.show(SearchResult.of(make_search(40), "search"))
            until(page, "document.getElementById('tested-table') !== null")
            assert page.js(headline).startswith("On 230 test items that the search did not use")
            assert page.complaints() == []
            growing.end(wait=True)
        until(page, ENDED)

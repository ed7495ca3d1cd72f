"""Pages in headless Chromium whose every name and text is a payload: none of them runs, and nothing is fetched."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from worlds.devtools import Browser, skip_without_browser, until, visit
from worlds.neuron_results import functions, profiles
from worlds.payloads import FORMS, Beacon, spoiled
from worlds.project import Project
from worlds.report_document import CONFIGURATIONS, make_document
from worlds.report_page import render
from worlds.search_document import make_search
from worlds.search_page import render as render_search
from worlds.search_world import RECIPE, lay_out
from worlds.toy_scores import SHARES, stored

from workbench.ground.manifest import CARD
from workbench.run.directory import run_for
from workbench.scores.store import Configuration, ScoreStore

if TYPE_CHECKING:
    pass

pytestmark = [pytest.mark.browser, pytest.mark.nightly, pytest.mark.part("view")]
skip_without_browser()

# A stranger's page names its own policy; it reads the first page of the viewer, and asks its chat.
FREE = """<!doctype html><meta http-equiv="Content-Security-Policy" content="base-uri *"><title>-</title>"""
ATTACK = """<script>(async () => {
  const read = await fetch("/").then((a) => a.text(), () => "");
  const body = JSON.stringify({names: ["base"], prompt: "x", tokens: 1, plain: true});
  const told = await fetch("/chat", {method: "POST", body, headers: {"Content-Type": "application/json"}}).then((a) => a.status, () => 0);
  document.title = `RAN read ${read.length}, chat ${told}`;
})();</script>"""
SETTLED = "new Promise((done) => setTimeout(done, 80))"
# What a reader does: opens all rows, sorts, filters, hovers.
READ = """(async () => {
  const wait = () => new Promise((done) => setTimeout(done, 40));
  for (const one of document.querySelectorAll('details')) one.open = true;
  await wait();
  for (const one of document.querySelectorAll('th.sorts, button[data-flips], #diff-swap, #beside-swap')) one.click();
  for (const one of document.querySelectorAll('select')) {
    one.selectedIndex = one.options.length - 1;
    one.dispatchEvent(new Event('input', { bubbles: true }));
  }
  await wait();
  for (const one of document.querySelectorAll('details')) one.open = true;
  for (const one of [...document.querySelectorAll('[title], g.mark')].slice(0, 200)) one.dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));
  await wait();
})()"""
SHOWN = """[document.body.textContent, ...[...document.querySelectorAll('*')].flatMap((e) => [...e.attributes].map((a) => a.value))].join('\\n')"""


class Trap:
    """Opens pages, and says what ran in them.

    Attributes:
        every: All payloads in one text.
    """

    def __init__(self, beacon: Beacon, page: Browser) -> None:
        self.payloads, self._asked, self.page = beacon.payloads, beacon.asked, page
        self.every = "\N{SNOWMAN}".join(beacon.payloads)

    def silent(self) -> None:
        """The page that is open runs nothing and fetches nothing, also while it is read."""
        self.page.js(READ)
        self.page.js(SETTLED)
        assert "RAN" not in _plain(self.page.js("document.title")).replace(_plain(self.every), "")
        assert self._asked == set()

    def shows(self) -> None:
        """The page has every payload as a text, and runs none of them."""
        self.silent()
        text = _plain(self.page.js(SHOWN))
        assert [one for one in self.payloads if _plain(one) not in text] == []


def _plain(text: str) -> str:
    """A text as a browser joins its spaces, and as the viewer writes a word of `meta` elements."""
    return re.sub(r"\s+", " ", text).replace("\N{NON-BREAKING HYPHEN}", "-")


@pytest.fixture(scope="module")
def beacon() -> Iterator[tuple[Beacon, str]]:
    made = Beacon()
    with made as home:
        yield made, home


@pytest.fixture
def trap(beacon: tuple[Beacon, str], started: Browser) -> Iterator[Trap]:
    beacon[0].asked.clear()
    with started.new_page() as page:
        yield Trap(beacon[0], page)


def test_the_payloads_run_on_a_page_that_does_not_hold(beacon: tuple[Beacon, str], started: Browser) -> None:
    """Show that a payload does run where nothing stops it: the other tests rely on that."""
    ran = set()
    for number in range(len(FORMS)):
        with started.new_page() as page:
            page.call("Page.navigate", url=f"{beacon[1]}/{number}")
            with contextlib.suppress(RuntimeError):  # it went elsewhere
                page.js(SETTLED)
                ran |= {number} if "RAN" in page.js("document.title") else set()
    assert len(ran | beacon[0].asked) >= 64, sorted(set(range(len(FORMS))) - ran - beacon[0].asked)


def test_a_report_and_its_items(trap: Trap, tmp_path: Path) -> None:
    few = {name: CONFIGURATIONS[name] for name in ("base", "add", "reverse", "triage", "average", "starter-ties", "over-scaled")}
    document = make_document(items=6, configurations=few)
    names = ("starter-ties", "triage")
    evil = spoiled(document, dict.fromkeys(names, trap.every))
    for one in evil["configurations"]:
        one["recipe_text"] = trap.every if one["recipe_text"] else None
        one["bricks"] = {trap.every: 3}
        one["axes"] = {trap.every: {"origin": trap.every, trap.every: trap.every}}
    for rows in evil["flips"].values():
        for row in rows[:2]:
            row |= {"prompt": trap.every, "gold": trap.every}
            row["configuration"]["response"] = trap.every
    evil["warnings"] = [trap.every]
    evil["provenance"] |= {
        "command": trap.every,
        "suites": [trap.every],
        "versions": {trap.every: trap.every},
        "plans": [trap.every],
    }
    trap.page.open(render(evil, tmp_path / "report")[0])
    trap.page.until("document.getElementById('flip-list').dataset.ready === 'yes'")
    trap.shows()


def test_the_report_of_a_search(trap: Trap, tmp_path: Path) -> None:
    evil = _search(trap.every)
    trap.page.open(render_search(evil, tmp_path / "search.html")[0])
    trap.shows()


def _search(text: str) -> dict[str, Any]:
    """The document of a search with this text in names and values."""
    return {**spoiled(make_search(12, comparison=False), dict.fromkeys(("mix.lambda", "ties", "toy"), text)), "warnings": [text]}


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch, trap: Trap) -> Project:
    """A project of a stranger."""
    lay_out(project, items=8, clusters=4)
    project.write(RECIPE, "mix.yaml")
    text = f"# {trap.every}\ndescription: {json.dumps(trap.every)}\nbricks: {{one: bricks/one, two: bricks/two}}\nsteps: [{{merge: average}}]\n"
    project.write(text, "mean.yaml")
    project.write(f"steps: [{{merge: {json.dumps(trap.every)}}}]\n", "wrong.yaml")
    for number, payload in enumerate(trap.payloads):
        if "/" not in payload and len(payload) < 200:  # what can be a file's name
            (project.path / "recipes" / f"{payload}.yaml").write_text("version: 1\nbase: base\nsteps: []\n", "utf-8")
            (project.path / "runs" / "neurons" / payload).mkdir(parents=True)
            (project.path / "runs" / "neurons" / payload / "index.html").write_text("x")
            (project.path / "runs" / "search" / f"{payload}-{number:08d}").mkdir(parents=True)
    monkeypatch.chdir(project.path)
    return project


@contextlib.contextmanager
def opened(trap: Trap, **options: Any) -> Iterator[str]:
    """The viewer of the current folder; yields its address, after the browser has opened it."""
    from workbench.view.app import application
    from workbench.view.pages import Site
    from workbench.view.server import Served

    with Served(application(Site(), **options)) as served:
        visit(trap.page, served.url)
        yield served.url.partition("?")[0]


def test_pages_of_the_viewer(world: Project, trap: Trap) -> None:
    made = Path(world.run((world.path / "recipes" / "mean.yaml").read_text(), "mean.yaml")["run"])
    record = json.loads((made / "run.json").read_text())
    record |= {
        "warnings": [trap.every],
        "licences": {trap.every: trap.every},
        "versions": {trap.every: trap.every},
        "name": trap.every,
    }
    record["inputs"]["bricks"] = spoiled(record["inputs"]["bricks"], {"one": trap.every})
    run = run_for(world.path / "runs", "evil", "3" * 20)
    made.rename(run.path)
    run.log({"stage": trap.payloads[0], "step": trap.payloads[2], "text": trap.every})
    (run.path / "run.json").write_text(json.dumps(record))
    (run.result / CARD).write_text(trap.every, "utf-8")
    found = world.path / "runs" / "search" / "found-12345678"
    found.mkdir()
    (found / "search.json").write_text(json.dumps(_search(trap.every)))
    files = [path.name for path in (world.path / "recipes").iterdir() if "RAN" in path.name]
    assert len(files) >= 16
    with opened(trap) as home, run.lock():
        for place in ("recipes/mean.yaml", "recipes/wrong.yaml", f"runs/{run.name}", f"searches/{found.name}", "live", ""):
            visit(trap.page, home + place)
            until(trap.page, "!document.querySelector('[aria-busy]')")
            trap.shows()
        for place in (
            "recipes",
            "recipes/mix.yaml?against=mean.yaml",
            "recipes/mean.yaml?against=mix.yaml",
            "runs",
            "scores",
            "searches",
        ):
            visit(trap.page, home + place)
            until(trap.page, "!document.querySelector('[aria-busy]')")
            trap.silent()
        for payload in trap.payloads[:8]:
            trap.page.call("Page.navigate", url=f"{home}runs/{payload}")
            until(
                trap.page,
                "document.readyState === 'complete' && document.querySelector('h1')?.textContent === 'This cannot be shown'",
            )
            trap.silent()


def test_scores_in_the_viewer(world: Project, trap: Trap) -> None:
    store = ScoreStore(world.path / "runs" / "scores")
    values = {c: [[float(i < 60 * share) for i in range(60)] for share in shares] for c, shares in SHARES.items()}
    named = Configuration("5" * 32, trap.every, "configuration", ("add", "sort"), "recipes/x.yaml")
    found = stored(store, {**values, named: next(reversed(values.values()))})
    folder = store.folder("toy", found[0].plan).name
    (store.root / folder / "damaged.json").write_text(json.dumps({"version": 2, "configuration": trap.every}))
    with opened(trap) as home:
        for place in ("scores", f"scores/{folder}"):
            visit(trap.page, home + place)
            trap.shows()


def test_the_chat_and_a_growing_page(world: Project, trap: Trap) -> None:
    from workbench.view.growing import Growing
    from workbench.view.pages import Site
    from workbench.view.talk import Asked, Talk, Tell

    class Parrot(Talk):
        """A model that answers with payloads, whatever it is asked."""

        def _answer(self, asked: Asked, tell: Tell, stop: Any) -> None:
            tell("note", trap.every)
            tell("model", {"number": 0, "kind": trap.every})
            tell("piece", trap.every)
            first, acted = [[one, 0.5] for one in trap.payloads], [["router", trap.every]]
            tell("done", {"seconds": 1, "first": first, "acted": acted, "make": trap.every})
            tell("error", {"message": trap.every, "hint": trap.every})

    with opened(trap, talk=Parrot("cpu")) as home:
        visit(trap.page, home + "chat")
        trap.page.js(f"document.querySelector('[name=name]').value = {json.dumps(trap.payloads[2])}")
        trap.page.js(f"document.querySelector('[name=prompt]').value = {json.dumps(trap.every)}")
        trap.page.js("document.getElementById('chat').requestSubmit()")
        until(trap.page, "document.querySelector('#chat-error .note') !== null")
        trap.shows()
        assert len(trap.page.js("document.querySelector('.said').textContent").split("\N{SNOWMAN}")) == len(FORMS)
    growing = Growing(Site(), "evaluation")
    growing.say(trap.every)
    with opened(trap, growing=growing):
        until(trap.page, "document.querySelector('#watch [data-stream]').textContent.includes('RAN0')")
        trap.shows()
        growing.end(wait=False)


def test_a_strangers_page_runs_nothing(world: Project, trap: Trap) -> None:
    """Before, 75 of the payloads ran or fetched, and the script of the first page read 42,706 characters and was answered by the chat."""
    from workbench.view.talk import Asked, Talk

    asked: list[Asked] = []

    class Listening(Talk):
        def answers(self, asking: Asked) -> Any:
            asked.append(asking)
            return super().answers(asking)

    folder = world.path / "runs" / "neurons" / "m"
    folder.mkdir(parents=True)
    for number, payload in enumerate([ATTACK, *trap.payloads]):
        (folder / f"{number}.html").write_text(FREE + payload, "utf-8")
    (folder / "wide.html").write_bytes((FREE + ATTACK).encode("utf-16"))
    with opened(trap, talk=Listening("cpu")) as home:
        for name in [*range(len(FORMS) + 1), "wide"]:
            trap.page.call("Page.navigate", url=f"{home}neurons/m/{name}.html")
            trap.page.js(SETTLED)
            assert trap.page.js("location.pathname") == f"/neurons/m/{name}.html"
            assert "RAN" not in trap.page.js("document.title")
    assert trap._asked == set()
    assert asked == []


@pytest.mark.part("neurons")
def test_the_pages_of_neurons_keep_their_scripts(world: Project, trap: Trap, tmp_path: Path) -> None:
    from workbench.neurons.pages.page import render_neurons

    found, examples = functions({"math": 3, "code": 0}), profiles("math", "code")
    evil = [
        type(one).model_validate(spoiled(one.to_dict(), {"m": trap.every, "one": trap.every, "1+1=": trap.every}))
        for one in (found, examples)
    ]
    folder = world.path / "runs" / "neurons" / "m"
    index = render_neurons({"functions": evil[0], "profiles": evil[1]}, folder / "index.html")
    with opened(trap) as home:
        visit(trap.page, f"{home}neurons/m/{index.name}")
        trap.shows()
        assert trap.page.js("document.querySelectorAll('.save button').length") >= 2, "the buttons are the script's"
        trap.page.js("document.querySelector('a[href=\"math.html\"]').click()")
        until(trap.page, "location.pathname.endsWith('/math.html') && document.readyState === 'complete'")
        trap.shows()
        assert trap.page.js("document.documentElement.classList.contains('js')"), "the page's script has run"
        assert trap.page.complaints() == []

"""The page of `search --watch`: it grows with the candidates, goes on with an earlier search, and ends as the search's report."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import pytest

from worlds.commands import call, refused
from worlds.project import Project
from worlds.search_document import make_search, unfinished
from worlds.search_world import SPACE, folder_of, search_of, searched
from worlds.viewer import followed

from workbench.report.page import Viewer
from workbench.search.pages import page_text
from workbench.search.result import GrowingSearch
from workbench.search.run import open_study, run
from workbench.search.winner import growing

pytestmark = pytest.mark.part("view")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every page that is served."""
    return followed(monkeypatch)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def headline(page: str) -> str:
    found = re.search(r'class="headline">([^<]*)<', page)
    return found[1].replace("\N{NO-BREAK SPACE}", " ") if found else ""


def test_the_page_grows_and_ends_as_the_report(world: Project, port: int, seen: list[str]) -> None:
    world.write(searched(SPACE, ", trials: 2, sampler: random, random: 1, controls: false"))
    called = call("search", "recipes/test.yaml", "--watch", "--port", str(port))
    assert f"the report grows at http://127.0.0.1:{port}/?token=" in called.stderr
    finished = [re.match(r"(\d) of 3 candidates are finished\. ", headline(page)) for page in seen[:-1]]
    counts = [int(found[1]) for found in finished if found]
    assert len(counts) == len(seen) - 1
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 3
    last = json.loads((folder_of(world) / "search.json").read_text())
    assert "Search in progress" in seen[-2]
    assert "Search in progress" not in seen[-1]
    assert f"{last['winner']} scores" in headline(seen[-1])
    assert 'id="tested-table"' in seen[-1]
    assert not list((folder_of(world) / "workers").glob("*.lock"))  # no process counts as alive
    # An earlier search is shown from the first control on.
    seen.clear()
    again = call("search", "recipes/test.yaml", "--trials", "3", "--watch", "--port", str(port))
    assert headline(seen[0]).startswith("3 of 4 candidates are finished.")
    assert "candidates that earlier calls finished: 3" in again.stderr


def test_what_the_page_says_is_what_the_study_holds(world: Project) -> None:
    """The best candidate, its score and the best control's are those of the stored records."""
    search = search_of(world, rest=", trials: 3, sampler: random, controls: false")
    run(search)
    study = open_study(search)
    try:
        state = growing(search, study)
        records = [r for r in study.finished("search") if r.complete]
    finally:
        study.close()
    assert (state.progress.done, state.progress.total) == (3, 3)
    assert (state.winner, state.recipes) == (None, {})
    control = max(search.controls, key=lambda rival: rival.scores[0])
    text = headline(page_text(state, Viewer((), "Live", 3)))
    beside = f"the best control, {control.name}, scores {100 * control.scores[0]:.1f} %"
    if not records:
        assert text == f"3 of 3 candidates are finished. No candidate is scored on all search items yet. On them, {beside}."
        return
    best = max(records, key=lambda r: r.scores)
    assert text == (
        f"3 of 3 candidates are finished. The best so far, {best.name}, scores {100 * best.scores[0]:.1f} % on search items, "
        f"and {beside}."
    )


def page_of(document: dict[str, Any]) -> str:
    return page_text(GrowingSearch.of(document, "search"), Viewer((), "Live", 1))


def test_two_objectives_name_their_front() -> None:
    document = unfinished(make_search(25, objectives=2, random=3), None)
    full = {t["name"]: t["scores"] for t in document["trials"] if t["arm"] == "search" and t["scores"] and not t["stopped"]}
    front = [n for n, s in full.items() if not any(o[0] >= s[0] and o[1] >= s[1] and o != s for o in full.values())]
    text = headline(page_of(document))
    assert text.startswith(f"28 candidates are finished. {len(front)} candidates are on the Pareto front so far: ")
    assert all(name in text for name in front)
    none = headline(page_of({**document, "trials": [t for t in document["trials"] if t.get("stopped")]}))
    assert none.endswith("finished. No candidate is scored on all search items yet.")


def test_ports_are_checked_before_any_work(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the recipe was read")

    world.write(searched(SPACE, ", trials: 2"))
    monkeypatch.setattr("workbench.search.commands.load_named", never)
    assert "without --watch" in refused("search", "test", "--port", "8765").message
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        error = refused("search", "test", "--watch", "--port", str(taken))
    assert (error.exit_code, error.message.startswith(f"--port {taken}: cannot listen on 127.0.0.1:{taken}: ")) == (2, True)
    for bad in ("70000", "-1", "http"):
        assert call("search", "test", "--watch", "--port", bad, code=2)

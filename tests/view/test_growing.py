"""The page of `eval --watch`: the newest report, its stream of events, its end, and the options that show it."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call
from worlds.decided import situation
from worlds.project import Project
from worlds.search_world import RECIPE, lay_out
from worlds.viewer import Visitor, followed

from workbench.console.watch import Watched, check_watch, watching
from workbench.ground.errors import UsageError
from workbench.ground.events import Event
from workbench.view.app import application
from workbench.view.folder import Folder
from workbench.view.growing import Growing
from workbench.view.pages import Site
from workbench.view.server import Served

WHOLE = {"share": 0.5, "left": 60.0, "finished": 1, "of": 2}
SCORED = "1 of 2 configurations are scored, 50 % of the items, about 60 s left"


@pytest.fixture
def growing() -> Growing:
    return Growing(Site(), "evaluation")


def served(growing: Growing, project: Path) -> Served:
    return Served(application(Site(Folder(project)), growing=growing))


def test_the_newest_report_is_sent(growing: Growing, tmp_path: Path) -> None:
    document = situation("winner")
    with served(growing, tmp_path) as server:
        visitor = Visitor(server.url)
        for path in ("/", "/live"):
            assert "Nothing can be compared yet" in visitor.page(path)
        events = visitor.events("/growing/0")
        assert next(events) == ("part", "Nothing is scored yet.")
        growing.say("3 of <b>10")
        assert next(events) == ("part", "3 of &lt;b&gt;10")
        growing.show(document)
        assert list(events) == [("page", 1)]
        page = visitor.page("/")
        assert "/growing/1" in page
        assert document.recommendation
        assert document.recommendation.text.partition(" [")[0] in page
        assert visitor.ask("/growing/x")[0] == 404
        assert visitor.ask("/chat")[0] == 404
        growing.end(wait=False)
        assert list(visitor.events("/growing/1")) == [("end", "")]


def test_the_end_waits_for_an_open_page_only(growing: Growing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, served(growing, tmp_path) as server:
        growing.show(situation("winner"))
        patch.setattr("workbench.view.growing.time.sleep", lambda _: pytest.fail("no page is open, and the end waits for one"))
        growing.end(wait=True)
    with pytest.raises(OSError, match="refused"):
        Visitor(server.url)
    for wait in ("_SEEN", "_LAST"):
        monkeypatch.setattr(f"workbench.view.growing.{wait}", 600.0)  # of a page on a busy machine
    growing, seen, open_ = Growing(Site(), "evaluation"), list[Any](), threading.Event()
    with served(growing, tmp_path) as server:
        visitor = Visitor(server.url)

        def browse() -> None:
            for version in (0, 1):
                seen.append(visitor.page("/"))
                for event in visitor.events(f"/growing/{version}"):
                    open_.set()
                    seen.append(event)

        thread = threading.Thread(target=browse, daemon=True)
        thread.start()
        open_.wait()
        growing.show(situation("winner"))
        growing.end(wait=True)
        thread.join()
    assert seen[-1] == ("end", "")
    assert "/growing/1" in seen[-2]


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for use in (lambda: Served(application(Site()), port), lambda: check_watch(True, port)):
            with pytest.raises(UsageError, match=f"--port {port}: cannot listen"):
                use()
    with pytest.raises(UsageError, match="without --watch"):
        check_watch(False, 80)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"stage": "search", "text": "trial-3: 0.5", "done": 3, "total": 10}, "3 of 10 candidates are finished; trial-3: 0.5."),
        ({"stage": "edit", "step": "rome", "text": "loss 0.1", "done": 3, "total": 10}, "Edit 3 of 10: loss 0.1."),
        ({"stage": "search", "text": "control 1/7: base"}, "Control 1/7: base."),
        (
            {"stage": "score", "configuration": "a", "number": 1, "of": 2, "text": "w: pick", "overall": WHOLE},
            f"{SCORED}; now a: w: pick.",
        ),
        ({"stage": "score", "configuration": "a", "scored": "w", "overall": WHOLE}, f"{SCORED}."),
        ({"stage": "run"}, None),
    ],
)
def test_what_open_pages_are_told(event: Event, said: str | None, growing: Growing) -> None:
    """The counts of a step that a candidate is made by are no candidates."""
    Watched(growing, lambda: None).event(event)
    assert growing._said == (said or "Nothing is scored yet.")


def test_without_watch_nothing_is_served() -> None:
    before = threading.active_count()
    with watching("evaluation", False, None) as page:
        page.event({"stage": "score", "text": "x"})
        assert threading.active_count() == before


def test_an_evaluation_is_seen_while_it_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is printed also if quiet, and each newer report is sent to the page that shows an older one."""
    lay_out(project, items=8, clusters=4).write(RECIPE, "mix.yaml")
    monkeypatch.chdir(project.path)
    pages = followed(monkeypatch)
    called = call("eval", "mix", "--device", "cpu", "--watch", "--quiet")
    assert re.search(r"the report grows at http://127\.0\.0\.1:\d+/\?token=[\w-]+ until", called.stderr.replace("\n", " "))
    assert len(pages) >= 3
    assert "Not scored yet: " in pages[0]
    assert "Not scored yet: " not in pages[-1]
    assert pages[-1].count('<nav class="viewer"') == 1

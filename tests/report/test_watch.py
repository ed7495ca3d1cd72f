"""The server of `eval --watch`: this machine only, read only, the newest report, and its end."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from worlds.decided import situation

from workbench.api.subjects import Opened
from workbench.cli._watch import check_watch, watching
from workbench.compare.comparison import Comparison
from workbench.errors import UsageError
from workbench.report.watch import Watched


def ask(port: int, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, headers={"Host": host} if host is not None else {})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def state(port: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ask(port, "/state")[2])
    return found


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return situation("winner")


def test_only_this_machine_is_answered(document: Comparison) -> None:
    with Watched() as watched:
        assert watched.url == f"http://127.0.0.1:{watched.port}/"
        assert watched._server.server_address[0] == "127.0.0.1"
        for host in (f"127.0.0.1:{watched.port}", f"LOCALHOST:{watched.port}"):
            assert ask(watched.port, host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{watched.port}", "127.0.0.1", f"127.0.0.1.evil.example:{watched.port}", ""):
            status, headers, text = ask(watched.port, host=host)
            assert (status, text) == (403, "This report is shown to this machine only.\n")
            assert "Access-Control-Allow-Origin" not in headers


def test_nothing_but_the_page_and_its_state_is_served() -> None:
    with Watched() as watched:
        for path in ("/state/", "/../../etc/passwd", "/etc/passwd", "/?x=1", "/page"):
            assert ask(watched.port, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "HEAD"):
            assert ask(watched.port, method=method)[0] == 501
        headers = ask(watched.port)[1]
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Frame-Options"] == "DENY"


def test_the_newest_report_is_served(document: Comparison) -> None:
    with Watched() as watched:
        assert "Nothing can be compared yet" in ask(watched.port)[2]
        assert state(watched.port) == {"version": 0, "text": "Nothing is scored yet.", "ended": False}
        watched.say("3 of 10")
        watched.show(document)
        assert state(watched.port) == {"version": 1, "text": "3 of 10", "ended": False}
        page = ask(watched.port)[2]
        assert 'data-version="1"' in page
        assert document.recommendation
        assert document.recommendation.text in page
        assert "connect-src 'self'" in page


def test_the_end_waits_for_an_open_page_only(document: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, Watched() as unseen:
        unseen.show(document)
        patch.setattr("workbench.report.watch.time.sleep", lambda _: pytest.fail("no page is open, and the end waits for one"))
    with pytest.raises(OSError, match="refused"):
        ask(unseen.port)
    seen: list[Any] = []

    def browse(port: int) -> None:
        while not seen or not seen[-1]["ended"]:
            seen.append(state(port))
            time.sleep(0.02)
        seen.append(ask(port)[2])

    for wait in ("_SEEN", "_LAST"):
        monkeypatch.setattr(f"workbench.report.watch.{wait}", 600.0)  # of a page on a busy machine
    with Watched() as watched:
        thread = threading.Thread(target=browse, args=(watched.port,), daemon=True)
        thread.start()
        while not seen:
            time.sleep(0.01)
        watched.show(document)
    thread.join()
    assert 'data-version="1"' in seen[-1]


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: cannot listen"):
            Watched(port)


def test_options_are_checked_before_any_work() -> None:
    with pytest.raises(UsageError, match="without --watch"):
        check_watch(False, 80, False)
    with pytest.raises(UsageError, match="is not printed"):
        check_watch(True, None, True)
    check_watch(True, 8765, True)
    check_watch(True, None, False)
    check_watch(False, None, True)


def test_without_watch_nothing_is_served(tmp_path: Path) -> None:
    from workbench.cli._output import out

    opened: Opened = None  # type: ignore[assignment]
    before = threading.active_count()
    with watching(opened, None, False, None) as events:
        assert events == out.event
        assert threading.active_count() == before

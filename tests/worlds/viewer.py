"""A visitor of the viewer who opened the printed address: answers of a served viewer over a connection, and its streams of events."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from workbench.view.growing import Growing
    from workbench.view.server import Served


class Visitor:
    """Asks a viewer with the cookie that its address gives."""

    def __init__(self, url: str) -> None:
        self.port = int(url.split(":")[2].partition("/")[0])
        status, headers, _ = self.ask(url.partition(f":{self.port}")[2], cookie="")
        assert (status, headers["location"]) == (303, "/")
        self.cookie = headers["set-cookie"].partition(";")[0]

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, cookie: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers in small letters, and text of an answer; a header's name is written with _ for -."""
        with self._asked(path, method, body, cookie, headers) as answer:
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()

    def page(self, path: str) -> str:
        """The text of a page that there is."""
        status, _, text = self.ask(path)
        assert status == 200, text
        return text

    def events(self, path: str, body: str | None = None) -> Iterator[tuple[str, Any]]:
        """Name and data of the events of a stream, until it ends or the caller stops."""
        headers = {"content_type": "application/json", "origin": f"http://127.0.0.1:{self.port}"} if body else {}
        with self._asked(path, "POST" if body else "GET", body, None, headers) as answer:
            assert answer.getheader("content-type", "").startswith("text/event-stream"), answer.read()
            text = ""
            while line := answer.readline().decode():
                text += line
                if found := re.fullmatch(r"event: (\w+)\ndata: (.*)\n\n", text):
                    yield found[1], json.loads(found[2])
                text = "" if line == "\n" else text

    @contextlib.contextmanager
    def _asked(
        self, path: str, method: str, body: str | None, cookie: str | None, headers: dict[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        sent = {"Cookie": self.cookie if cookie is None else cookie, **{k.replace("_", "-"): v for k, v in headers.items()}}
        try:
            connection.request(method, path, body, sent)
            yield connection.getresponse()
        finally:
            connection.close()


def followed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every report that `--watch` serves from now on, as a browser gets it when it is told of it; none is skipped because it comes soon after another."""

    from workbench.view.growing import Growing
    from workbench.view.server import Served

    monkeypatch.setattr("workbench.console.watch._PAUSE", 0.0)
    monkeypatch.setattr("workbench.console.watch._SHARE", 1e9)
    monkeypatch.setattr("workbench.view.growing._LAST", 0.0)  # these pages do not listen until the end
    pages, visitors = list[str](), list[Visitor]()
    show, begin = Growing.show, Served.__enter__
    counts: dict[int, int] = {}

    def begun(server: Served) -> Served:
        begin(server)
        visitors.append(Visitor(server.url))
        return server

    def shown(growing: Growing, document: Any) -> None:
        seen = counts.get(id(growing), 0)
        show(growing, document)
        assert next(visitors[-1].events(f"/growing/{seen}")) == ("page", seen + 1)
        counts[id(growing)] = seen + 1
        pages.append(visitors[-1].page("/"))

    monkeypatch.setattr(Served, "__enter__", begun)
    monkeypatch.setattr(Growing, "show", shown)
    return pages

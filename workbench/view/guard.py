"""Who is answered by the viewer: browsers on this machine that opened the address which the command printed.

The server listens on 127.0.0.1 only. A page of another site cannot read it: a request needs a Host header of this machine (DNS rebinding),
a cookie that is sent to this site alone, and for a POST an Origin that is this site. The cookie comes from the token in the printed
address, which a redirect takes out of the address bar.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from workbench.ground.sites import foreign
from workbench.report.page import inlined

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADDRESS = "127.0.0.1"
LONGEST_BODY = 64 << 10
"""Largest body of a POST, in bytes."""
_POLICY = re.compile(rb'http-equiv="Content-Security-Policy" content="([^"]*)"')
_WRITTEN = (("report.js",), ("report.js", "downloads.js"))
"""Scripts of each kind of page that `workbench analyze` writes."""
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """Passes on the requests that may be answered, and adds headers that protect the answers.

    Args:
        app: Answers the requests.
        port: Port of the server.

    Attributes:
        token: The secret in the address that the command prints.
        url: That address.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app, self._hosts = app, re.compile(rf"({re.escape(ADDRESS)}|localhost):{port}")
        self.token = secrets.token_urlsafe(24)
        self.url = f"http://{ADDRESS}:{port}/?token={self.token}"
        self._cookie, self._secret = f"workbench-{port}", secrets.token_urlsafe(24)  # browsers share cookies among ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
            await send(message)

        await (self._refusal(scope) or self._app)(scope, receive, protected)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is not passed on; None for one that is."""
        asked, method = HTTPConnection(scope), scope["method"]
        headers = asked.headers
        if not self._hosts.fullmatch(headers.get("host", "").lower()):
            return PlainTextResponse("This page is shown to this machine only.\n", 403)
        if method not in ("GET", "POST"):
            return PlainTextResponse("Nothing can be changed here.\n", 405, {"Allow": "GET, POST"})
        if (token := asked.query_params.get("token")) and method == "GET":
            if not _same(token, self.token):
                return _closed()
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self._cookie, self._secret, httponly=True, samesite="strict")
            return answer
        if not _same(asked.cookies.get(self._cookie, ""), self._secret):
            return _closed()
        if method == "POST" and (
            "origin" not in headers
            or foreign(headers, method, self._hosts)
            or not headers.get("content-length", "").isdecimal()
            or int(headers["content-length"]) > LONGEST_BODY
            or "transfer-encoding" in headers  # the body may be longer than the header says
        ):
            return PlainTextResponse("This request does not come from the viewer's own page.\n", 403)
        return None


def page(text: str, status: int = 200) -> Response:
    """Return a page of the viewer with its own content security policy as a header too, which also forbids frames around it."""
    data = text.encode()
    found = _POLICY.search(data)
    policy = {"Content-Security-Policy": f"{found[1].decode()}; frame-ancestors 'none'"} if found else {}
    return Response(data, status, policy, "text/html; charset=utf-8")


def file_page(text: str) -> Response:
    """Return a page from a file of the project, which a stranger may have written: no script runs in it but those of the pages of `analyze`.

    Nothing that the page says of itself counts: the header has the policy, and what its `meta` elements do, such as go to another address,
    needs the attribute http-equiv, which is a plain word here.
    """
    scripts = " ".join(f"'{inlined(names)[1]}'" for names in _WRITTEN)
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    plain = re.sub("http-equiv", "http\N{NON-BREAKING HYPHEN}equiv", text, flags=re.IGNORECASE)
    headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
    return Response(plain, 200, headers, "text/html; charset=utf-8")


def _closed() -> Response:
    return PlainTextResponse("Open the address that the command printed: its token opens this page.\n", 403)


def _same(found: str, expected: str) -> bool:
    return secrets.compare_digest(found.encode(), expected.encode())

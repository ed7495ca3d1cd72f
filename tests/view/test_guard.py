"""Who is answered by the viewer: this machine, with the printed address, from the viewer's own pages; and what leaves with an answer."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from workbench.view.guard import LONGEST_BODY, Guard, page

HOME = "http://127.0.0.1:8000"
META = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'sha256-x'\">"


def ask(request: Request) -> Response:
    return page(META) if request.method == "GET" else PlainTextResponse("computed")


@pytest.fixture
def guard() -> Guard:
    return Guard(
        Starlette(
            routes=[Route("/", ask), Route("/plain", lambda _: PlainTextResponse("x")), Route("/ask", ask, methods=["POST"])]
        ),
        8000,
    )


@pytest.fixture
def visitor(guard: Guard) -> TestClient:
    """Someone who opened the printed address."""
    client = TestClient(guard, HOME, follow_redirects=False)
    answer = client.get(guard.url)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=strict"} <= {part.strip() for part in answer.headers["set-cookie"].split(";")}
    assert guard.token not in answer.headers["set-cookie"]
    return client


def test_the_printed_address_opens_the_pages(visitor: TestClient) -> None:
    for host in ("127.0.0.1:8000", "LOCALHOST:8000"):
        assert visitor.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1", "127.0.0.1.evil.example:8000", "127.0.0.1:8001", "", "[::1]:8000"]
)
def test_other_names_of_this_machine_are_refused(visitor: TestClient, guard: Guard, host: str) -> None:
    """Also with the token: a name that another site's owner points here (DNS rebinding)."""
    for path in ("/", f"/?token={guard.token}"):
        answer = visitor.get(path, headers={"Host": host})
        assert (answer.status_code, answer.text) == (403, "This page is shown to this machine only.\n")
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", ["/", "/?token=", "/?token=x", "/nothing", "/?token=\N{SNOWMAN}"])
def test_without_the_token_nothing_is_shown(guard: Guard, path: str) -> None:
    client = TestClient(guard, HOME, follow_redirects=False)
    for cookie in (
        "",
        "workbench-8000=",
        "workbench-8000=x",
        f"workbench-8000={guard.token}",
        "workbench-8000=\u00e9",
        "a=b;;=;\x01",
    ):
        answer = client.get(path, headers={b"Cookie": cookie.encode("utf-8")})
        assert (answer.status_code, answer.text[:4]) == (403, "Open"), (path, cookie)


def test_only_the_viewers_own_page_posts(visitor: TestClient) -> None:
    good = {"Origin": HOME, "Content-Type": "application/json"}
    assert visitor.post("/ask", content=b"{}", headers=good).text == "computed"
    for wrong in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8001"},
        {"Origin": "https://127.0.0.1:8000"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Length": str(LONGEST_BODY + 1)},
        {"Content-Length": "-1"},
        {"Transfer-Encoding": "chunked", "Content-Length": "2"},
    ):
        assert visitor.post("/ask", content=b"{}", headers={**good, **wrong}).status_code == 403, wrong
    assert visitor.post("/ask", content=b"{}", headers={"Content-Type": "application/json"}).status_code == 403
    assert TestClient(visitor.app, HOME).post("/ask", content=b"{}", headers=good).status_code == 403


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "HEAD", "CONNECT"])
def test_no_method_changes_anything(visitor: TestClient, method: str) -> None:
    answer = visitor.request(method, "/")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")


def test_answers_are_protected(visitor: TestClient) -> None:
    for path, policy in (
        ("/", "default-src 'none'; script-src 'sha256-x'; frame-ancestors 'none'"),
        ("/plain", "default-src 'none'; frame-ancestors 'none'"),
    ):
        headers = visitor.get(path).headers
        assert headers["content-security-policy"] == policy
        assert {k: headers[k] for k in ("cache-control", "x-frame-options", "x-content-type-options", "referrer-policy")} == {
            "cache-control": "no-store",
            "x-frame-options": "DENY",
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        assert "access-control-allow-origin" not in headers

"""A tiny model behind the server's application, and requests to it without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from worlds.tiny import live, save_model

from workbench.models.prompts import load_tokenizer

if TYPE_CHECKING:
    from workbench.serve.app import Served

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)
HOME = "http://127.0.0.1:8000"
LONGEST = 64


@contextmanager
def tiny_served(path: Path) -> Iterator[Served]:
    """Serve a tiny model in float32 under the name "tiny"."""
    from workbench.serve.app import Served
    from workbench.serve.engine import Engine

    base = save_model(path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = TEMPLATE
    engine = Engine(live(base).float(), tokenizer)
    yield Served("tiny", engine, LONGEST)
    assert engine.close(60)


def visitor(app: Any) -> httpx.AsyncClient:
    """Return a client of an application, whose errors are answers."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=HOME, timeout=None)


async def leaves(app: Any, path: str, body: dict[str, Any], *, after: int = 0) -> list[dict[str, Any]]:
    """Send a request whose client leaves after some messages of the answer; return the messages that came."""
    sent, came = False, list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        if len(came) >= after:
            return {"type": "http.disconnect"}
        raise AssertionError("the application waits for a client that has not left")

    async def send(message: dict[str, Any]) -> None:
        came.append(message)

    headers = [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST"}
    scope |= {"scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    return came

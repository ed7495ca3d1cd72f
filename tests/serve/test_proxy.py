"""A router before a LoRA server: requests go on with the adapter's name or scales, answers come back as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from worlds.commands import refused
from worlds.local_server import Handler, LocalServer
from worlds.project import Project
from worlds.routing import prompts, write_prompts
from worlds.served import HOME

import workbench
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.serve.proxy import Front, Upstream, application

BRICKS = ("one", "two")
KINDS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}
STREAM = b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n'


@contextmanager
def upstream(server: str, adapters: tuple[str, ...] = BRICKS, *, status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """A server with some adapters that keeps what it is asked; yield its address and the requests."""
    asked: list[Any] = []
    names = {
        "vllm": ["org/base", *adapters],
        "sglang": ["org/base", *(f"org/base:{name}" for name in adapters)],
        "llama.cpp": ["x"],
    }

    class Answers(Handler):
        def answer(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            found: Any = {"data": [{"id": name, "owned_by": KINDS.get(server, server)} for name in names.get(server, ["x"])]}
            if self.path == "/lora-adapters":
                found = [{"id": i, "path": f"/models/adapters/{name}.gguf", "scale": 0.0} for i, name in enumerate(adapters)]
            self.answer(json.dumps(found).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, dict(self.headers)))
            if body.get("stream"):
                self.answer(STREAM, "text/event-stream")
            else:
                self.answer(json.dumps({"choices": [{"text": "a"}]}).encode(), status=status)

    with LocalServer(Answers) as url:
        yield url, asked


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, llama: Path, bricks: Path) -> tuple[Path, Any]:
    """A routed configuration over two bricks, and its live model."""
    path = tmp_path_factory.mktemp("routed")
    (path / "recipes").mkdir()
    (path / "base").symlink_to(llama)
    (path / "bricks").symlink_to(bricks)
    write_prompts(path / "calibration", {"one": 0, "two": 1}, count=16, templates=8)
    entries = ", ".join(f"{name}: bricks/{name}" for name in BRICKS)
    text = f"bricks: {{{entries}}}\nsteps: [{{route: ridge, calibration: 'calibration/{{brick}}.jsonl', samples: 16}}]\n"
    place = Path(Project(path).run(text, "routed.yaml")["run"]) / "configuration"
    return place, workbench.load(str(place))


def client(routed: tuple[Path, Any], url: str, **more: Any) -> TestClient:
    place, model = routed
    tokenizer = workbench.load_tokenizer(str(place))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    front = Front("mine", model.routing, tokenizer, Upstream.find(url, BRICKS), **more)
    return TestClient(application(front), HOME, raise_server_exceptions=False)


def sent(asked: list[Any]) -> dict[str, Any]:
    body: dict[str, Any] = asked[-1][1]
    return body


@pytest.mark.parametrize("server", KINDS)
def test_a_request_names_the_brick_that_the_router_chooses(routed: tuple[Path, Any], server: str) -> None:
    """The brick's own prompts go to it; fields that only the server knows go on."""
    names = {
        "vllm": {name: {"model": name} for name in BRICKS},
        "sglang": {name: {"model": f"org/base:{name}"} for name in BRICKS},
        "llama.cpp": {
            name: {
                "model": name,
                "lora": [{"id": i, "scale": float(name == other)} for i, other in enumerate(BRICKS)],
                "cache_prompt": False,
            }
            for name in BRICKS
        },
    }[server]
    with upstream(server) as (url, asked), client(routed, url) as http:
        for number, name in enumerate(BRICKS):
            for text in prompts(number, seed=1)[:3]:
                answer = http.post("/v1/completions", json={"model": "mine", "prompt": text, "top_k": 3})
                assert answer.json() == {"choices": [{"text": "a"}]}
                assert sent(asked) == {"prompt": text, "top_k": 3, **names[name]}
                assert answer.headers["X-Brick"] == name
                assert float(answer.headers["X-Confidence"]) > 0
                assert answer.headers["X-Abstained"] == "false"
        text = prompts(1, seed=1)[0]
        http.post("/v1/chat/completions", json={"model": "mine", "messages": [{"role": "user", "content": text}]})
        assert asked[-1][0] == "/v1/chat/completions"
        assert sent(asked) == {"messages": [{"role": "user", "content": text}], **names["two"]}
        begun = {"messages": [{"role": "user", "content": text}], "continue_final_message": True}
        assert http.post("/v1/chat/completions", json={"model": "mine", **begun}).status_code == 400  # and a new message, too
        begun["add_generation_prompt"] = False
        assert http.post("/v1/chat/completions", json={"model": "mine", **begun}).headers["X-Brick"] == "two"
        assert http.post("/v1/completions", json={"model": "one", "prompt": text}).headers["X-Brick"] == "one"
        assert sent(asked) == {"prompt": text, **names["one"]}
        http.post("/v1/completions", json={"model": "base", "prompt": text})
        base = (
            {"model": "x", "lora": [{"id": i, "scale": 0.0} for i in range(2)], "cache_prompt": False}
            if server == "llama.cpp"
            else {"model": "org/base"}
        )
        assert sent(asked) == {"prompt": text, **base}
        assert 'workbench_texts_total{brick="base"} 1' in http.get("/metrics").text


def test_streams_and_failures_come_back_as_they_are(routed: tuple[Path, Any]) -> None:
    text = prompts(0, seed=1)[0]
    with upstream("vllm") as (url, _), client(routed, url) as http:
        answer = http.post("/v1/completions", json={"model": "mine", "prompt": text, "stream": True})
        assert answer.content == STREAM
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert http.get("/health").status_code == 200
    assert http.get("/health").status_code == 503
    gone = http.post("/v1/completions", json={"model": "mine", "prompt": text})
    assert gone.status_code == 502
    assert "does not answer" in gone.json()["error"]["message"]
    with upstream("vllm", status=429) as (url, _), client(routed, url) as http:
        assert http.post("/v1/completions", json={"model": "mine", "prompt": text}).status_code == 429


def test_keys_are_apart(routed: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of clients does not reach the server, and the server's key does not reach clients."""
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    body = {"model": "one", "prompt": "w8"}
    with upstream("vllm") as (url, asked), client(routed, url, key="ours") as http:
        assert http.post("/v1/completions", json=body).status_code == 401
        assert not asked
        assert http.post("/v1/completions", json=body, headers={"Authorization": "Bearer ours"}).status_code == 200
        assert asked[-1][2]["Authorization"] == "Bearer theirs"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the request"),
        (b"[]", 400, "a JSON object"),
        (b'{"model": "nine", "prompt": "w8"}', 404, "no model 'nine': this server has mine, one, two, base"),
        (b'{"model": "mine"}', 400, "'prompt' cannot be read"),
        (b'{"model": "mine", "prompt": ""}', 400, "the prompt has no tokens"),
        (b'{"model": "mine", "prompt": [{"a": 1}]}', 400, "'prompt' cannot be read"),
        (b'{"model": "mine", "prompt": 3}', 400, "'prompt' cannot be read"),
        (b'{"model": "mine", "prompt": []}', 400, "the prompt has no tokens"),
        (b'{"model": "mine", "prompt": [99999]}', 400, "a token is none of 0 to"),
        (json.dumps({"model": "mine", "prompt": ["w8"] * 129}).encode(), 400, "129 prompts; a request has at most 128"),
        (json.dumps({"model": "mine", "prompt": [8] * (1 << 17) + [8]}).encode(), 400, "reads 131072 tokens of a request"),
        (b" " * (5 << 20), 413, "more than 4 MB"),
    ],
)
def test_bad_requests_do_not_go_on(routed: tuple[Path, Any], body: bytes, status: int, message: str) -> None:
    with upstream("vllm") as (url, asked), client(routed, url) as http:
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text
        assert not asked


def test_other_sites_pages_cannot_ask(routed: tuple[Path, Any]) -> None:
    with upstream("vllm") as (url, asked), client(routed, url) as http:
        for headers, status in (
            ({"Host": "evil.example"}, 403),
            ({"Origin": "https://evil.example"}, 403),
            ({"Content-Type": "text/plain"}, 415),
        ):
            assert (
                http.post("/v1/completions", content=b'{"model": "one", "prompt": "w8"}', headers=headers).status_code == status
            )
        assert not asked


def test_prompts_of_different_bricks_are_refused(routed: tuple[Path, Any]) -> None:
    one, two = (prompts(number, seed=1)[0] for number in range(2))
    with upstream("vllm") as (url, asked), client(routed, url) as http:
        answer = http.post("/v1/completions", json={"model": "mine", "prompt": [one, two]})
        assert answer.status_code == 400
        assert "send each by itself" in answer.json()["error"]["message"]
        assert http.post("/v1/completions", json={"model": "mine", "prompt": [one, one]}).headers["X-Brick"] == "one"
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("server", "adapters", "message"),
    [
        ("vllm", ("one",), "expected the adapters one, two; the server has one$"),
        ("sglang", (), "the server has none$"),
        ("llama.cpp", ("two", "one"), "expected the adapters one, two, in this order; the server has two, one$"),
        ("ollama", BRICKS, "expected vLLM, SGLang or llama-server"),
    ],
)
def test_servers_without_the_bricks_are_refused(server: str, adapters: tuple[str, ...], message: str) -> None:
    with upstream(server, adapters) as (url, _), pytest.raises(UsageError, match=message):
        Upstream.find(f"{url}/v1", BRICKS)


def test_the_command_says_what_is_missing(routed: tuple[Path, Any]) -> None:
    place, _ = routed
    with upstream("vllm", ()) as (url, _):
        assert "the server has none" in refused("serve", str(place), "--to", url, "--port", "0", "--device", "cpu").message
    with pytest.raises(WorkbenchError, match="cannot be reached"):
        Upstream.find("http://127.0.0.1:9", BRICKS)
    with pytest.raises(UsageError, match="expected the address of a server"):
        Upstream.find("nowhere", BRICKS)

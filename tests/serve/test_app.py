"""The endpoint: OpenAI's forms, what is refused, keys, limits, streams, and the brick that answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from worlds.served import HOME, tiny_served

from workbench.serve import failing
from workbench.serve.app import Served, application
from workbench.serve.metrics import Answers, Histogram, family

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with tiny_served(tmp_path_factory.mktemp("served")) as made:
        yield made


@pytest.fixture
def client(served: Served) -> TestClient:
    return TestClient(application(served), HOME, raise_server_exceptions=False)


def completion(client: TestClient, **fields: Any) -> Any:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "w8 w9 w10", "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_completions_and_what_they_cost(client: TestClient) -> None:
    found = completion(client, max_tokens=4)
    assert found["object"] == "text_completion"
    assert found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    several = completion(client, prompt=["w8 w9 w10", "w20"], n=2, max_tokens=4)["choices"]
    assert [one["index"] for one in several] == [0, 1, 2, 3]
    assert several[0]["text"] == several[1]["text"] == choice["text"]
    assert completion(client, prompt=[8, 9, 10], max_tokens=4)["usage"]["prompt_tokens"] == 3


def test_probabilities_of_prompts_as_lm_eval_reads_them(served: Served, client: TestClient) -> None:
    tokens = [8, 9, 10, 11]
    (choice,) = completion(client, prompt=[tokens], max_tokens=1, logprobs=1, echo=True)["choices"]
    with torch.no_grad():
        expected = served.engine.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    scores = choice["logprobs"]
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][1:4] == pytest.approx([float(expected[i, tokens[i + 1]]) for i in range(3)], abs=1e-4)
    assert len(scores["tokens"]) == len(scores["text_offset"]) == 5
    best = [max(top, key=top.__getitem__) for top in scores["top_logprobs"][1:4]]
    assert best == [served.engine.tokenizer.decode([int(row.argmax())]) for row in expected[:3]]
    (none,) = completion(client, prompt=[tokens], max_tokens=0, logprobs=1, echo=True)["choices"]
    assert len(none["logprobs"]["tokens"]) == 4


def test_chats(client: TestClient) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "w8 w9"}], "max_tokens": 3, "temperature": 0}
    found = client.post("/v1/chat/completions", json={**asked, "logprobs": True, "top_logprobs": 2}).json()
    (choice,) = found["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["logprobs"]["content"]) == 3
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    parts = {
        **asked,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "w8 "}, {"type": "text", "text": "w9"}]}],
    }
    again = client.post("/v1/chat/completions", json=parts).json()
    assert again["choices"][0]["message"] == choice["message"]


def events(client: TestClient, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_streams_have_the_text_of_an_answer(client: TestClient) -> None:
    body = {"model": "tiny", "prompt": "w8 w9 w10", "temperature": 0, "max_tokens": 5}
    found = events(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert "".join(event["choices"][0]["text"] for event in found[:-1]) == completion(client, max_tokens=5)["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in found[:-1]][-1] == "length"
    assert found[-1]["usage"]["completion_tokens"] == 5
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "w8"}], "max_tokens": 3, "temperature": 0}
    found = events(client, "/v1/chat/completions", chat)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in event["choices"][0]["delta"] for event in found[1:])


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"prompt": "w8", "model": "other"}, 404, "no model 'other': this server has tiny"),
        ("completions", {"model": "tiny"}, 400, "prompt: Field required"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "the prompt has no tokens"),
        (
            "completions",
            {"model": "tiny", "prompt": "w8", "max_tokens": 64},
            400,
            "this model reads 64 tokens; the prompt has 1, and 64 new",
        ),
        ("completions", {"model": "tiny", "prompt": [99999]}, 400, "a token of the prompt is none of 0 to"),
        ("completions", {"model": "tiny", "prompt": "w8", "frequency_penalty": 1}, 400, "frequency_penalty"),
        ("completions", {"model": "tiny", "prompt": "w8", "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ("completions", {"model": "tiny", "prompt": []}, 400, "prompt: expected at least one"),
        (
            "completions",
            {"model": "tiny", "prompt": ["w8"] * 43, "n": 3},
            400,
            "43 prompts with n = 3 are 129 texts; a request has at most 128",
        ),
        ("completions", {"model": "tiny", "prompt": {"a": 1}}, 400, "prompt: expected a text, a list of texts, a list of tokens"),
        (
            "completions",
            {"model": "tiny", "prompt": [[8] * 33] * 32},
            400,
            "the prompts have 1056 tokens, counted once for each of n = 1; a request has at most 1024",
        ),
        (
            "completions",
            {"model": "tiny", "prompt": "w8", "seed": 2**63},
            400,
            "seed: Input should be less than 9223372036854775808",
        ),
        ("completions", {"model": "tiny", "prompt": "w8", "stop": ["w"] * 17}, 400, "stop"),
        ("completions", {"model": "tiny", "prompt": "w8", "logprobs": 21}, 400, "logprobs"),
        ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        (
            "completions",
            {"model": "tiny", "prompt": "w8", "store": True},
            400,
            "store: this server does not support it: leave it out, or send false",
        ),
        ("completions", {"model": "tiny", "prompt": "w8", "top_k": 3}, 400, "top_k: this server does not know the field"),
        (
            "chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": None}]},
            400,
            "expected the content of the turn of 'user'",
        ),
        (
            "chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            400,
            'messages.0.content.0: this model reads text alone, and no part of type "image_url"',
        ),
        ("responses", {"model": "tiny", "input": "w8"}, 404, "no address /v1/responses: ask /v1/chat/completions"),
        ("embeddings", {"model": "tiny", "input": "w8"}, 404, "serve an embedding model with another server"),
        ("nothing", {}, 404, "no address /v1/nothing: this server has /v1/chat/completions, "),
    ],
)
def test_what_is_refused(client: TestClient, path: str, body: dict[str, Any], status: int, message: str) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


def test_fields_that_change_nothing_are_accepted(client: TestClient) -> None:
    """What OpenAI's SDKs and those built on them send without need, and an answer that a client sends back as it came."""
    plain = {"model": "tiny", "messages": [{"role": "user", "content": "w8"}], "temperature": 0, "max_tokens": 3}
    more = {
        "tools": [],
        "tool_choice": "none",
        "store": False,
        "parallel_tool_calls": True,
        "frequency_penalty": 0.0,
        "seed": None,
    }
    more |= {"response_format": {"type": "text"}, "metadata": {"a": "b"}, "stop": None, "logit_bias": {}, "user": "u", "n": None}
    first = client.post("/v1/chat/completions", json=plain).json()["choices"][0]["message"]
    answer = client.post("/v1/chat/completions", json={**plain, **more})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"] == first
    turns = [
        *plain["messages"],
        {**first, "refusal": None, "audio": None, "function_call": None, "tool_calls": None, "annotations": []},
    ]
    turns += [{"role": "assistant", "content": None}, {"role": "developer", "content": "w9"}]
    same = [*plain["messages"], first, {"role": "assistant", "content": ""}, {"role": "system", "content": "w9"}]
    found = [client.post("/v1/chat/completions", json={**plain, "messages": one}).json() for one in (turns, same)]
    assert found[0]["choices"] == found[1]["choices"]
    assert found[0]["usage"] == found[1]["usage"]


def test_bodies_that_are_no_requests(client: TestClient) -> None:
    assert client.post("/v1/completions", content=b"{", headers=JSON).status_code == 400
    large = client.post("/v1/completions", content=b"x" * (failing.BODY + 1), headers=JSON)
    assert large.status_code == 413
    assert client.get("/v1/completions").status_code == 405


def test_a_key(served: Served) -> None:
    client = TestClient(application(Served("tiny", served.engine, 64, key="secret")), HOME, raise_server_exceptions=False)
    body = {"model": "tiny", "prompt": "w8", "max_tokens": 1}
    assert client.post("/v1/completions", json=body).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401
    assert client.post("/v1/completions", json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
    foreign = {"Authorization": "Bearer secret", "Host": "models.example", "Origin": "app://client"}
    assert client.post("/v1/completions", json=body, headers=foreign).status_code == 200, "behind a proxy with TLS"
    assert client.post("/v1/completions", content=b"{}", headers={**foreign, "Content-Type": "text/plain"}).status_code == 415
    assert client.get("/health").status_code == 200, "who watches the server needs no key"


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"Host": "evil.example:8000"}, 403, "the Host header names no address of this machine: 'evil.example:8000'"),
        ({"Host": "127.0.0.1.evil.example"}, 403, "Host"),
        ({"Host": ""}, 403, "Host"),
        ({"Origin": "https://evil.example"}, 403, "the Origin header names another site: 'https://evil.example'"),
        ({"Origin": "null"}, 403, "Origin"),
        ({"Origin": "http://127.0.0.1:8001"}, 403, "Origin"),
        ({"Content-Type": "text/plain"}, 415, "expected the header `Content-Type: application/json`"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
        ({"Content-Type": "text/plain; application/json"}, 415, "Content-Type"),
        ({}, 200, ""),
        ({"Host": "localhost", "Content-Type": "Application/JSON; charset=utf-8"}, 200, ""),
        ({"Host": "[::1]:9000"}, 200, ""),
        ({"Origin": HOME}, 200, ""),
    ],
)
def test_other_sites_pages_cannot_ask(client: TestClient, headers: dict[str, str], status: int, message: str) -> None:
    """What a page of another site can send: a simple request, or one to a name of its own that points here."""
    body = json.dumps({"model": "tiny", "prompt": "w8", "max_tokens": 1}).encode()
    answer = client.post("/v1/completions", content=body, headers={**JSON, **headers})
    assert (answer.status_code, message in answer.text) == (status, True), answer.text
    for path in ("/v1/models", "/metrics", "/health"):
        assert client.get(path, headers=headers).status_code == (status if status == 403 else 200)
    assert "access-control-allow-origin" not in client.options("/v1/completions", headers=headers).headers


def test_models_and_metrics(client: TestClient) -> None:
    found = client.get("/v1/models").json()
    assert [(row["id"], row["max_model_len"]) for row in found["data"]] == [("tiny", 64)]
    assert found["limits"] == {"choices": 128, "prompt_tokens": 16 * 64, "body_bytes": 4 << 20, "waiting": 256, "seconds": 600}
    completion(client, max_tokens=2)
    asked = (client.get("/metrics").text.splitlines() for _ in range(10_000))
    lines = next(lines for lines in asked if "workbench_running_texts 0" in lines)  # soon after the answer
    assert any(line.startswith("workbench_written_tokens_total ") for line in lines)


def test_metrics_are_valid_and_count_what_happened(served: Served) -> None:
    """As Prometheus' own parser reads them, which knows types, labels and buckets."""
    parser = pytest.importorskip("prometheus_client.parser")
    client = TestClient(application(replace(served, answers=Answers())), HOME, raise_server_exceptions=False)
    completion(client, prompt=["w8", "w9"], max_tokens=2)
    for body in ({"model": "tiny", "prompt": "w8", "top_p": 7}, {"model": "none", "prompt": "w8"}):
        client.post("/v1/completions", json=body)
    client.get("/v1/elsewhere", headers={"Origin": "https://evil.example"})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {one.name: one for one in parser.text_string_to_metric_families(answer.text)}
    assert all(one.documentation and one.type in ("counter", "gauge", "histogram") for one in found.values())
    told = {(row.labels["path"], row.labels["status"]): row.value for row in found["workbench_answers"].samples}
    assert told == {
        ("/v1/completions", "200"): 1,
        ("/v1/completions", "400"): 1,
        ("/v1/completions", "404"): 1,
        ("other", "403"): 1,
    }
    for name, count in (("answer_seconds", 3), ("first_token_seconds", 1)):
        rows = {(row.name, row.labels.get("le")): row.value for row in found[f"workbench_{name}"].samples}
        buckets = [value for (_, bound), value in rows.items() if bound]
        assert buckets == sorted(buckets)
        assert rows[f"workbench_{name}_bucket", "+Inf"] == rows[f"workbench_{name}_count", None] == count
        assert rows[f"workbench_{name}_sum", None] > 0
    assert {
        "workbench_waiting_seconds",
        "workbench_running_texts",
        "workbench_waiting_requests",
        "workbench_texts",
    } <= found.keys()
    (texts,) = found["workbench_texts"].samples
    assert (texts.labels, texts.value >= 2) == ({"brick": "model"}, True)


def test_labels_and_buckets_of_metrics() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    told = Histogram()
    for seconds in (0.05, 0.051, 700):
        told.add(seconds)
    name = 'a "quoted"\\ name\nof two lines'
    text = family("x_seconds", "histogram", "x", told.rows()) + family("y_total", "counter", "y", [("", {"brick": name}, 2**40)])
    seconds, texts = parser.text_string_to_metric_families(text)
    assert [row.value for row in seconds.samples] == [1, 2, *[2] * 11, 3, pytest.approx(700.101), 3]
    assert (texts.samples[0].labels, texts.samples[0].value) == ({"brick": name}, 2**40)

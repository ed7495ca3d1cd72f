"""Texts that are held to JSON: whatever a model would write, they fit their schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from worlds.served import HOME, TEMPLATE

from workbench.serve.app import Served, application
from workbench.serve.engine import Engine

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "Köter"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def letters() -> Any:
    """A tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({"<eos>": 0, **{letter: 1 + i for i, letter in enumerate(alphabet)}}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    return tokenizer


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 264}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=512, eos_token_id=0, initializer_range=0.2)).eval()
    engine = Engine(model, letters())
    yield Served("tiny", engine, 512)
    assert engine.close(60)


@pytest.fixture
def client(served: Served) -> TestClient:
    return TestClient(application(served), HOME, raise_server_exceptions=False)


def asked(client: TestClient, form: Any, **more: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "who?"}], "response_format": form, "seed": 1, **more}
    return client.post("/v1/chat/completions", json=body)


def schema(told: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": told}}


def test_texts_fit_their_schema(client: TestClient) -> None:
    """A model with random weights, drawn at two temperatures and taken greedily, four texts each, beside a text without a form."""
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema")
    free = {"model": "tiny", "prompt": "a", "max_tokens": 8, "temperature": 0}
    alone = client.post("/v1/completions", json=free).json()["choices"]
    found = set()
    for temperature in (0, 0.7, 2):
        answer = asked(client, schema(PERSON), temperature=temperature, n=4, max_tokens=400)
        for choice in answer.json()["choices"]:
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
            found.add(choice["message"]["content"])
        assert client.post("/v1/completions", json=free).json()["choices"] == alone
    assert len(found) > 5
    for choice in asked(client, {"type": "json_object"}, n=4, max_tokens=60).json()["choices"]:
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_models_that_write_one_text_at_a_time(served: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(served.engine, "_together", False)
    answer = asked(client, schema({"enum": ["yes", "no"]}), temperature=0)
    assert json.loads(answer.json()["choices"][0]["message"]["content"]) in ("yes", "no")


@pytest.mark.parametrize(
    ("form", "more", "message"),
    [
        (schema({"type": "nothing"}), {}, "response_format: the schema cannot be used: "),
        (schema({"type": "string", "format": "a-format"}), {}, "response_format: the schema cannot be used: "),
        ({"type": "json_schema"}, {}, 'response_format: expected `json_schema` with the type "json_schema"'),
        ({"type": "grammar"}, {}, "response_format.type: Input should be 'text', 'json_object' or 'json_schema'"),
        (
            {"type": "json_object"},
            {"tools": [{"type": "function", "function": {"name": "x"}}]},
            "response_format: a text that is held to JSON calls no tools",
        ),
    ],
)
def test_forms_that_are_refused(client: TestClient, form: Any, more: Any, message: str) -> None:
    pytest.importorskip("llguidance")
    answer = asked(client, form, **more)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text


def test_a_server_without_the_library_says_what_to_install(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    answer = asked(client, {"type": "json_object"})
    assert answer.status_code == 400
    assert "pip install 'brick-workbench[json]'" in answer.json()["error"]["message"]

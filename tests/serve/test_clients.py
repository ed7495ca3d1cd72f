"""OpenAI's own client against a running server: chats, streams, errors, and an agent with tools."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from worlds.served import tiny_served

from workbench.serve import tools
from workbench.serve.app import Served, application
from workbench.serve.server import listening

openai = pytest.importorskip("openai")

# A chat in words of the tiny tokenizer: after a user's turn stands w40, after a tool's w41. Tools are told as w50.
TEMPLATE = (
    "{% for t in tools or [] %}w50 {% endfor %}{% for m in messages %}w6 {{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %} w1 {{ c['function']['name'] }} w2{% endfor %} w7 {% endfor %}"
    "{% if add_generation_prompt %}{{ 'w41' if messages[-1]['role'] == 'tool' else 'w40' }}{% endif %}"
)
CALLS = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["w40", "w41"],
    "fields": {
        "tool_calls": {
            "open_pattern": r"w1 (?P<name>w\d+)",
            "close": "w2",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": {"city": "{content}"}}},
        },
        "content": {"close": "<eos>", "content": "text"},
    },
}
# What the model writes after a token: a call of the tool w20 after a user's turn, an answer after a tool's.
AFTER = {"w40": "w1", "w1": "w20", "w20": "w35", "w35": "w2", "w41": "w30", "w30": "w31"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("w20", "w22")
]


def write_bigrams(model: Any, tokenizer: Any) -> None:
    """Make a model one whose next token depends on the last one alone."""
    import torch

    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in {*AFTER, *AFTER.values()}}
    pairs = [(ids[one], ids[two]) for one, two in AFTER.items()] + [(ids[word], tokenizer.eos_token_id) for word in ("w2", "w31")]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        seen = model.model.norm(model.get_input_embeddings().weight)
        head = torch.zeros_like(model.lm_head.weight)
        for last, following in pairs:
            head[following] += 100 * torch.linalg.pinv(seen[[one for one, _ in pairs]])[:, [one for one, _ in pairs].index(last)]
        model.lm_head.weight = torch.nn.Parameter(head)
    model.generation_config.eos_token_id = tokenizer.eos_token_id


@contextmanager
def answering(served: Served) -> Iterator[Any]:
    """Serve at a free port, and yield OpenAI's client of it."""
    with listening("127.0.0.1", 0) as opened:
        opened.listen(16)
        server = uvicorn.Server(uvicorn.Config(application(served), log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{opened.getsockname()[1]}/v1", api_key="-", max_retries=0)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with tiny_served(tmp_path_factory.mktemp("served")) as made:
        tokenizer = made.engine.tokenizer
        tokenizer.chat_template, tokenizer.response_template = TEMPLATE, CALLS
        write_bigrams(made.engine.model, tokenizer)
        made.engine.ends = {tokenizer.eos_token_id}
        yield made


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with answering(served) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_with_tools(client: Any, stream: bool) -> None:
    """Ten turns: each question is a call of a tool, whose result is sent back with the client's own message object."""
    messages: list[Any] = []
    for number in range(5):
        messages = [*messages[-3:], {"role": "user", "content": f"w{8 + number}"}]
        asked = {"model": "tiny", "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 8}
        if stream:
            *_, last = client.chat.completions.create(**asked, stream=True)
            (choice,) = last.choices
            (call,) = choice.delta.tool_calls
            assert call.index == 0
            messages.append({"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude={"index"})]})
        else:
            (choice,) = client.chat.completions.create(**asked).choices
            (call,) = choice.message.tool_calls
            messages.append(choice.message)
        assert choice.finish_reason == "tool_calls"
        assert (call.function.name, json.loads(call.function.arguments)) == ("w20", {"city": "w35"})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "w25"})
        answer = client.chat.completions.create(**{**asked, "messages": messages})
        assert answer.choices[0].message.content == "w30 w31"
        assert (answer.choices[0].finish_reason, answer.choices[0].message.tool_calls) == ("stop", None)
        messages.append(answer.choices[0].message)


def test_tools_that_are_not_to_be_called(client: Any) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "w8"}], "temperature": 0, "max_tokens": 8}
    plain = client.chat.completions.create(**asked)
    none = client.chat.completions.create(**asked, tools=TOOLS, tool_choice="none")
    assert (none.choices[0].message.content, none.usage) == (plain.choices[0].message.content, plain.usage)
    with pytest.raises(openai.BadRequestError, match="tool_choice: Input should be 'none' or 'auto'"):
        client.chat.completions.create(**asked, tools=TOOLS, tool_choice="required")


def test_models_without_tools_say_what_is_missing(served: Served, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "w8"}], "tools": TOOLS}
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
        with pytest.raises(openai.BadRequestError, match="this model's chat template does not read tools"):
            client.chat.completions.create(**asked)
    monkeypatch.setattr(served.engine.tokenizer, "response_template", {"fields": {}})
    with pytest.raises(openai.BadRequestError, match="transformers cannot use the tokenizer's `response_template`"):
        client.chat.completions.create(**asked)
    monkeypatch.delattr(served.engine.tokenizer, "response_template")
    with pytest.raises(openai.BadRequestError, match=r"has no `response_template`, and transformers knows none for `llama`"):
        client.chat.completions.create(**asked)


QWEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (QWEN, [("weather", {"city": "Köln", "days": 2})]),
        (f"I ask.\n{QWEN}\n{QWEN}<|im_end|>", [("weather", {"city": "Köln", "days": 2})] * 2),
        (QWEN[:40], None),
        ("<tool_call>\nnothing\n</tool_call>", None),
        ("no call", None),
    ],
)
def test_calls_of_a_family_that_transformers_knows(
    served: Served, monkeypatch: pytest.MonkeyPatch, text: str, calls: Any
) -> None:
    """As Qwen's models write them; what cannot be read stays text."""
    monkeypatch.delattr(served.engine.tokenizer, "response_template")
    monkeypatch.setattr(served.engine.model.config, "model_type", "qwen3")
    found = tools.parsed(served.engine.tokenizer, served.engine.model, [8], text, TOOLS)
    told = found and [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in found["tool_calls"]]
    assert told == calls
    assert not found or found["content"] in (None, "I ask.")


def test_chats_completions_and_errors(client: Any, tmp_path: Path) -> None:
    name = client.models.list().data[0].id
    asked = {"model": name, "temperature": 0, "max_tokens": 2}
    user = [{"role": "user", "content": "w8"}]
    whole = client.chat.completions.create(**asked, messages=user, n=2, store=False, parallel_tool_calls=True)
    parts = client.chat.completions.create(**asked, messages=user, stream=True, stream_options={"include_usage": True})
    assert (
        "".join(part.choices[0].delta.content for part in parts if part.choices) == whole.choices[1].message.content == "w1 w20"
    )
    again = client.chat.completions.create(**asked, messages=[*user, whole.choices[0].message, *user])
    assert again.choices[0].message.content == "w1 w20"
    assert client.completions.create(**asked, prompt="w1", logprobs=1).choices[0].text.split() == ["w20", "w35"]
    for wrong, error in (({"seed": 2**80}, openai.BadRequestError), ({"model": "none"}, openai.NotFoundError)):
        with pytest.raises(error):
            client.chat.completions.create(**{**asked, **wrong}, messages=user)
    with pytest.raises(openai.NotFoundError, match="ask /v1/chat/completions"):
        client.responses.create(model=name, input="w8")
    with pytest.raises(openai.NotFoundError, match="serve an embedding model"):
        client.embeddings.create(model=name, input="w8")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    with pytest.raises(openai.BadRequestError, match="this model reads text alone"):
        client.chat.completions.create(**asked, messages=[{"role": "user", "content": [image]}])

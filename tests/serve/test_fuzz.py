"""One client cannot change another's text: any requests, and clients that leave, beside four good ones."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from worlds.served import leaves, tiny_served, visitor

from workbench.serve.app import Served, application

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD = [
    (TEXT, {"model": "tiny", "prompt": "w8 w9 w10", "temperature": 0, "max_tokens": 12}),
    (TEXT, {"model": "tiny", "prompt": ["w20 w21", "w5"], "temperature": 1.3, "seed": 4, "max_tokens": 9, "n": 2}),
    (
        CHAT,
        {"model": "tiny", "messages": [{"role": "user", "content": "w8 w9"}], "temperature": 0, "max_tokens": 10, "stream": True},
    ),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "w30"}], "seed": 2**62, "max_tokens": 8, "stop": ["w1"]}),
]
WORDS = ["", "w8", "w8 " * 70, "\x00", "\ud800", "é€😀" * 9, "x" * 300, "tiny", "user", "[]", "stop"]
NUMBERS = [
    0,
    1,
    -1,
    2,
    16,
    128,
    129,
    2**31,
    2**63,
    2**80,
    -(2**80),
    10**400,
    0.5,
    1e-320,
    1e-7,
    1e300,
    -0.0,
    float("nan"),
    float("inf"),
]
OTHERS = [None, True, False, [], {}, [[]], [None], [[1, 2], "w8"], [8, 9], [-1], [99999], [2**70], {"a": 1}]
FIELDS = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "n",
    "stream",
    "stream_options",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "user",
    "logprobs",
    "top_logprobs",
    "echo",
    "best_of",
    "suffix",
    "response_format",
    "tools",
    "tool_choice",
    "store",
    "metadata",
    "nothing",
]
RAW = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"tiny"',
    b"\xff\xfe",
    b"[" * 5000,
    b'{"model": "tiny", "prompt": "w8", "seed": 1e999}',
    b'{"model": "tiny"',
]


def anything(chance: random.Random, depth: int = 0) -> Any:
    """A value that a field may have in a bad request."""
    kind = chance.randrange(8 if depth < 3 else 6)
    if kind < 6:
        return chance.choice((WORDS, NUMBERS, OTHERS)[kind % 3])
    if kind == 6:
        return [anything(chance, depth + 1) for _ in range(chance.choice((1, 2, 5, 200 if depth == 0 else 3)))]
    names = ["role", "content", "type", "text", "name", "include_usage", "image_url"]
    return {chance.choice(names): anything(chance, depth + 1) for _ in range(3)}


# Values that a request may have, and those just beyond: most bad requests are good ones but for these.
NEAR: dict[str, list[Any]] = {
    "seed": [0, -1, 2**63 - 1, 2**63, -(2**63), 2**80, -(2**80), 10**400],
    "temperature": [0, 1e-320, 1e-30, 1e-7, 1e-4, 2, 2.1, -1, 1e300, float("nan"), float("inf")],
    "top_p": [1, 1e-320, 1e-30, 0.5, 0, -1, 1.1, float("nan")],
    "max_tokens": [0, 1, 5, 63, 64, 2**63, 2**80, -1, None],
    "n": [1, 3, 128, 129, 0, -1, 2**80],
    "stop": ["", "w1", ["w1", ""], ["w"] * 16, ["w"] * 17, "x" * 256, "x" * 257, ["\ud800"], []],
    "prompt": [
        [],
        [[]],
        "",
        " ",
        "w8 " * 63,
        "w8 " * 64,
        [0],
        [99999],
        [-1],
        [2**70],
        ["w8"] * 128,
        ["w8"] * 129,
        [[8, 9]] * 3,
        "\ud800",
        None,
    ],
    "logprobs": [0, 1, 20, 21, True, False],
    "top_logprobs": [0, 20, 21],
    "echo": [True, False],
    "tools": [[], [{}], [{"type": "function", "function": {"name": "x"}}], [{"type": "function", "function": {"name": ""}}]],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, {"type": "text"}, {"type": "x"}, {}],
    "stream": [True, False],
    "messages": [
        [],
        [{}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "w8"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [{"role": "\x00", "content": "w8"}] * 9,
        [{"role": "user", "content": "w8"}] * 200,
    ],
}


def bad(chance: random.Random) -> tuple[str, bytes]:
    """An address and a body: a good one with some fields replaced, by values near what is allowed or by anything."""
    path, body = chance.choice(GOOD)
    kind = chance.randrange(10)
    if kind == 0:
        return path, chance.choice(RAW)
    if kind == 1:
        changed = {chance.choice(FIELDS): anything(chance) for _ in range(chance.randrange(1, 4))}
    else:
        names = [
            name
            for name in NEAR
            if (name in ("messages", "top_logprobs", "tools", "response_format")) <= (path == CHAT)
            and (name in ("prompt", "echo")) <= (path == TEXT)
        ]
        changed = {name: chance.choice(NEAR[name]) for name in chance.sample(names, chance.choice((1, 1, 2)))}
    return path, json.dumps({**body, "max_tokens": 3, **changed}).encode()


def told(answer: httpx.Response) -> Any:
    """What a client reads of an answer, without names and times of the request."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.json()["choices"], answer.json()["usage"]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [json.loads(line)["choices"] for line in lines[:-1]], lines[-1]


async def good(client: httpx.AsyncClient) -> list[Any]:
    return [told(answer) for answer in await asyncio.gather(*(client.post(path, json=body) for path, body in GOOD))]


async def disturbed(served: Served, seed: int, *, rounds: int, beside: int) -> list[str]:
    """Send good requests beside bad ones and clients that leave; return what went wrong."""
    app, chance, wrong = application(served), random.Random(seed), list[str]()
    async with visitor(app) as client:
        alone = [told(await client.post(path, json=body)) for path, body in GOOD]
        for _ in range(rounds):
            sent = [bad(chance) for _ in range(beside)]
            asked = [client.post(path, content=body, headers={"Content-Type": "application/json"}) for path, body in sent]
            left = [leaves(app, *chance.choice(GOOD), after=chance.choice((0, 0, 1, 2))) for _ in range(2)]
            answers, found, _ = await asyncio.gather(asyncio.gather(*asked), good(client), asyncio.gather(*left))
            wrong += [
                f"{a.status_code}: {body[:300]!r}: {a.text[:200]}"
                for (_, body), a in zip(sent, answers, strict=True)
                if a.status_code >= 500
            ]
            wrong += [f"changed: {GOOD[i]}" for i in range(len(GOOD)) if found[i] != alone[i]]
    return wrong


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with tiny_served(tmp_path_factory.mktemp("served")) as made:
        made.engine.most = 10_000  # three requests of 128 texts each would have the others wait in vain
        yield made


def test_bad_requests_change_no_other_text(served: Served) -> None:
    assert not asyncio.run(disturbed(served, 0, rounds=6, beside=15))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_bad_requests_change_no_other_text(served: Served, seed: int) -> None:
    assert not asyncio.run(disturbed(served, seed, rounds=17, beside=16))


def test_who_leaves_before_the_first_token_is_noticed(served: Served) -> None:
    """While others are being written, and whether the answer would have been a stream or not."""
    many = {"model": "tiny", "prompt": "w8", "temperature": 0, "max_tokens": 63, "n": 60}

    async def tried() -> list[Any]:
        app = application(served)
        async with visitor(app) as client:
            busy = asyncio.create_task(client.post(TEXT, json=many))
            await asyncio.sleep(0)
            while not served.engine.load[1]:
                await asyncio.sleep(0.01)
            found = [await leaves(app, *GOOD[i]) for i in (0, 2)]
            assert not busy.done()
            assert (await busy).status_code == 200
        return found

    before = served.engine.counts["prompt_tokens"]
    assert [one[0]["status"] for one in asyncio.run(tried())] == [499, 499]
    assert served.engine.counts["prompt_tokens"] == before + 60, "what they asked for was not begun"

"""Many clients of `workbench serve` for some minutes, while a brick is added and removed: answers, latencies and memory.

    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --clients 4 --seconds 30 --prompts 8      a quick look

The served configuration is recipes/starter-route.yaml, in float32 and in bfloat16. Before the load, one client asks for the text of every prompt, with and without the
added brick. Under load each client asks for one text after the other, by chance as a stream or whole, as a chat or a completion. An answer
is wrong if its text is none of the two that the prompt had when it was asked alone, or if its header names another brick than that text's;
it is lost if none comes. In bfloat16 the rounding depends on how many texts are written together, and texts change with it. `later` is the resident memory after the first tenth of the time, `end` that at its end.
Results go to benchmarks/results/serve-load.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
RECIPE, ADDED = "recipes/starter-route.yaml", "glossary"
DTYPES = ("float32", "bfloat16")
MINUTES = 600.0
"""Seconds that a client waits for an answer."""
Found = tuple[str, str]
"""A text, and the brick that the header names."""


@dataclass
class Load:
    """What the clients saw.

    Attributes:
        expected: Kind and prompt -> the answers that it had alone.
        seconds: Seconds of each answer.
        first: Seconds to the first piece of each stream.
        statuses: Status -> answers; "lost" if none came.
        bricks: Brick -> answers.
        wrong: Answers that were not expected.
        tokens: New tokens.
    """

    expected: dict[tuple[str, str], list[Found]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    bricks: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0


def main() -> None:
    """Serve, ask alone, ask under load, and write the results file."""
    parser = parser_of(__doc__, "serve-load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300, help="length of the load")
    parser.add_argument("--prompts", type=int, default=48, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=16, help="largest number of new tokens of a text")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for dtype in DTYPES:
            written = command("run", RECIPE, "--set", f"output.dtype={dtype}", "--runs-dir", scratch, "--json")
            place = Path(json.loads(written)["run"]) / "configuration"
            with serving(place) as (address, process):
                found[dtype] = asyncio.run(measured(address, process.pid, place, options))
    settings = {"clients": options.clients, "prompts": options.prompts, "most_tokens": options.tokens}
    write_results(options.out, {**settings, "dtypes": found})


def command(*arguments: str) -> str:
    """Run a command of the workbench, and return what it prints."""
    line = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(line, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def serving(place: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve a directory at a free port; yield its address and the process."""
    line = [sys.executable, "-m", "workbench", "serve", str(place), "--port", "0"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process.stdout.readline().strip(), process
    finally:
        process.terminate()
        process.wait(60)


async def measured(address: str, pid: int, place: Path, options: Any) -> dict[str, Any]:
    """Ask alone and under load, and return the results."""
    prompts = sample(options.prompts)
    async with httpx.AsyncClient(base_url=address, timeout=MINUTES, limits=httpx.Limits(max_connections=None)) as client:
        name = (await client.get("/models")).json()["data"][0]["id"]
        load, alone = Load(), Load()
        for change in ((), ("add", str(place), ADDED), ("rm", str(place), ADDED)):
            if change:
                await asyncio.to_thread(command, "route", *change)
            if change[:1] != ("rm",):
                for kind in ("chat/completions", "completions"):
                    for prompt in prompts:
                        found = await ask(client, name, kind, prompt, options.tokens, alone, stream=False)
                        load.expected.setdefault((kind, prompt), []).append(found)
        spent = sum(alone.seconds)
        start, memory = time.perf_counter(), [resident(pid)]
        clients = [
            asyncio.create_task(one(client, name, load, options.tokens, start + options.seconds, random.Random(number)))
            for number in range(options.clients)
        ]
        changing = asyncio.create_task(changes(place, options.seconds))
        while not all(task.done() for task in clients):
            await asyncio.sleep(1)
            memory.append(resident(pid))
        took = time.perf_counter() - start
        changed = await changing
        health = (await client.get(f"{address.removesuffix('/v1')}/health")).status_code
    return {
        "alone": {"answers": len(alone.seconds), "tokens_per_second": alone.tokens / spent, **quantiles(alone.seconds)},
        "load": {
            "seconds": took,
            "answers": len(load.seconds),
            "statuses": dict(load.statuses),
            "wrong": len(load.wrong),
            "tokens_per_second": load.tokens / took,
            "bricks": dict(load.bricks),
            **quantiles(load.seconds),
            "first_piece": quantiles(load.first),
        },
        "changes": changed,
        "memory": {"before": memory[0], "later": memory[len(memory) // 10], "end": memory[-1]},
        "health_after": health,
        "wrong_answers": load.wrong[:10],
    }


def sample(count: int) -> list[str]:
    """Return some prompts for each brick of the router, for the added one, and for none of them."""
    wanted = ("add", "reverse", "triage", ADDED, None)
    rows = [json.loads(line) for line in (PROJECT / "evals/routing/fresh.jsonl").read_text("utf-8").splitlines()]
    groups = [[row["prompt"] for row in rows if row["brick"] == brick and row["variant"] == "plain"] for brick in wanted]
    return [group[turn] for turn in range(max(map(len, groups))) for group in groups if turn < len(group)][:count]


async def ask(client: httpx.AsyncClient, name: str, kind: str, prompt: str, tokens: int, load: Load, *, stream: bool) -> Found:
    """Ask for a text, and count the answer."""
    asked = {"messages": [{"role": "user", "content": prompt}]} if kind.startswith("chat") else {"prompt": prompt}
    body: dict[str, Any] = {
        "model": name,
        "temperature": 0,
        "max_tokens": tokens,
        "stream": stream,
        "stream_options": None,
        **asked,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    start = time.perf_counter()
    text, used, first = "", 0, 0.0
    async with client.stream("POST", f"/{kind}", json=body) as answer:
        load.statuses[str(answer.status_code)] += 1
        if answer.status_code != 200:
            return (await answer.aread()).decode(), "refused"
        brick = answer.headers["X-Brick"]
        if stream:
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                first = first or time.perf_counter() - start
                piece = json.loads(data)
                used = piece["usage"]["completion_tokens"] if piece.get("usage") else used
                text += "".join(
                    choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in piece["choices"]
                )
            load.first.append(first)
        else:
            found = json.loads(await answer.aread())
            (choice,) = found["choices"]
            text, used = (
                choice["message"]["content"] if "message" in choice else choice["text"],
                found["usage"]["completion_tokens"],
            )
    load.seconds.append(time.perf_counter() - start)
    load.tokens += used
    load.bricks[brick] += 1
    return text, brick


async def one(client: httpx.AsyncClient, name: str, load: Load, tokens: int, end: float, chance: random.Random) -> None:
    """Ask for one text after the other until the time is over."""
    cases = list(load.expected)
    while time.perf_counter() < end:
        kind, prompt = chance.choice(cases)
        try:
            found = await ask(client, name, kind, prompt, tokens, load, stream=chance.random() < 0.5)
        except httpx.HTTPError as error:
            load.statuses["lost"] += 1
            load.wrong.append({"prompt": prompt, "found": repr(error)})
            continue
        if found not in load.expected[kind, prompt]:
            load.wrong.append({"prompt": prompt, "found": repr(found), "expected": repr(load.expected[kind, prompt])})


async def changes(place: Path, seconds: float) -> dict[str, float]:
    """Add a brick after a third of the time, remove it after two thirds, and return the seconds that each command took."""
    took = {}
    for action in ("add", "rm"):
        await asyncio.sleep(seconds / 3)
        start = time.perf_counter()
        await asyncio.to_thread(command, "route", action, str(place), ADDED)
        took[action] = time.perf_counter() - start
    return took


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def resident(pid: int) -> float:
    """Return the resident memory of a process, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()

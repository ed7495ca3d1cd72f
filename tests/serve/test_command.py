"""`workbench serve`: a process that answers, changes its bricks while it runs, and ends its texts before it ends."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import document, refused
from worlds.project import Project
from worlds.routing import prompts, write_prompts
from worlds.tiny import save_model

CARD = "version: 1\nname: NAME\nkind: adapter\nbase:\n  id: base\nscores: []\n"
SLOW = 60  # seconds


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """A project whose bricks are copies of its own, each with prompts."""
    linked = project.path / "bricks"
    target = linked.resolve()
    linked.unlink()
    for name in ("one", "two", "three"):
        shutil.copytree(target / name, linked / name)
        (linked / name / "brick.yaml").write_text(CARD.replace("NAME", name), "utf-8")
    write_prompts(project.path / "calibration", {"one": 0, "two": 1, "three": 2}, count=16, templates=8)
    return project


def routed(project: Project, *names: str) -> Path:
    """The configuration of a router over some bricks."""
    bricks = ", ".join(f"{name}: bricks/{name}" for name in names)
    text = f"bricks: {{{bricks}}}\nsteps: [{{route: ridge, calibration: 'calibration/{{brick}}.jsonl', samples: 16}}]\n"
    return Path(project.run(text, f"{'-'.join(names)}.yaml")["run"]) / "configuration"


@contextmanager
def serving(target: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve a target at a free port; yield its address and the process."""
    command = [sys.executable, "-m", "workbench", "serve", str(target), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), process.stderr.read() if process.stderr else ""
        yield address, process
    finally:
        process.kill()
        process.communicate()


def ask(address: str, path: str, body: dict[str, Any] | None = None, key: str = "") -> tuple[Any, HTTPMessage]:
    """Return the answer to a request, and its headers."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{address}{path}", data, headers), timeout=SLOW) as answer:
        return json.loads(answer.read()), answer.headers


def completed(address: str, prompt: str, **fields: Any) -> tuple[str, HTTPMessage]:
    """Return the text behind a prompt, and the headers of the answer."""
    name = ask(address, "/models")[0]["data"][0]["id"]
    body = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": 4, **fields}
    found, headers = ask(address, "/completions", body)
    return found["choices"][0]["text"], headers


def test_bricks_are_added_and_removed_while_requests_come(world: Project) -> None:
    """Every request is answered with the text of the brick that its header names, and the new brick answers without a new start."""
    place = routed(world, "one", "two")
    whole = routed(world, "one", "two", "three")
    texts = [text for number in range(3) for text in prompts(number, seed=1)[:4]]
    with serving(whole) as (address, _):
        expected = {
            text: {name: completed(address, text, model=name)[0] for name in ("one", "two", "three", "base")} for text in texts
        }
        chosen = {text: completed(address, text)[1]["X-Brick"] for text in texts}
    assert "three" in chosen.values()
    with serving(place) as (address, process), ThreadPoolExecutor(4) as pool:
        names = [row["id"] for row in ask(address, "/models")[0]["data"]]
        assert names[1:] == ["one", "two", "base"]
        many = [pool.submit(completed, address, text) for text in texts * 4]
        document("route", "add", str(place), "three", "--calibration", "calibration/three.jsonl", "--device", "cpu")
        answers = [(text, *one.result()) for text, one in zip(texts * 4, many, strict=True)]
        assert all(found == expected[text][headers["X-Brick"]] for text, found, headers in answers)
        assert {text: completed(address, text)[1]["X-Brick"] for text in texts} == chosen
        assert [row["id"] for row in ask(address, "/models")[0]["data"]][1:] == ["one", "two", "three", "base"]
        document("route", "rm", str(place), "one")
        assert "one" not in {completed(address, text)[1]["X-Brick"] for text in texts}
        with pytest.raises(urllib.error.HTTPError) as error:
            completed(address, texts[0], model="one", logprobs=-1)
        assert error.value.code == 400
        assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_texts_end(number: signal.Signals, world: Project) -> None:
    place = routed(world, "one", "two")
    text = prompts(0, seed=1)[0]
    with serving(place) as (address, process), ThreadPoolExecutor(64) as pool:
        whole = completed(address, text, max_tokens=24)[0]
        running = [pool.submit(completed, address, text, max_tokens=24) for _ in range(64)]
        while "workbench_running_texts 0" in metrics(address):
            time.sleep(0.01)
        process.send_signal(number)
        ended = [one.result()[0] for one in running if not isinstance(one.exception(), urllib.error.URLError | ConnectionError)]
        assert ended == [whole] * len(ended)
        assert ended, "no text was being written"
        _, messages = process.communicate(timeout=SLOW)
    assert process.returncode == 0, messages
    assert "Traceback" not in messages


def metrics(address: str) -> str:
    with urllib.request.urlopen(f"{address.removesuffix('/v1')}/metrics", timeout=SLOW) as answer:
        return str(answer.read(), "utf-8")


def test_a_key_is_asked_for(world: Project) -> None:
    place = routed(world, "one", "two")
    with serving(place, "--key", "secret") as (address, _):
        for key in ("", "wrong"):
            with pytest.raises(urllib.error.HTTPError) as error:
                ask(address, "/models", key=key)
            assert error.value.code == 401
        assert ask(address, "/models", key="secret")[0]["object"] == "list"
        with urllib.request.urlopen(f"{address.removesuffix('/v1')}/health", timeout=SLOW) as answer:
            assert answer.read() == b"ok\n"


def test_what_is_refused(world: Project) -> None:
    place = routed(world, "one", "two")
    assert "everyone who reaches this machine" in refused("serve", str(place), "--host", "0.0.0.0").message
    with serving(place) as (address, _):
        port = address.rpartition(":")[2].removesuffix("/v1")
        assert f"cannot listen on 127.0.0.1:{port}" in refused("serve", str(place), "--port", port).message


def test_lm_eval_scores_the_server_as_it_scores_the_model(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    base = save_model(tmp_path / "base", dtype=torch.float32)
    texts = prompts(0, seed=1)[:6]
    choices = [Instance("loglikelihood", {}, (text, f" w{i + 9}"), i) for i, text in enumerate(texts)]
    writes = [Instance("generate_until", {}, (text, {"until": ["w12"], "max_gen_toks": 5}), i) for i, text in enumerate(texts)]
    alone = get_model("hf")(pretrained=str(base), device="cpu", dtype="float32", batch_size=1)
    with serving(base) as (address, _):
        name = ask(address, "/models")[0]["data"][0]["id"]
        served = get_model("local-completions")(
            model=name,
            base_url=f"{address}/completions",
            tokenizer=str(base),
            tokenizer_backend="huggingface",
            num_concurrent=3,
            max_retries=1,
        )
        scores = served.loglikelihood(choices, disable_tqdm=True)
        written = served.generate_until(writes, disable_tqdm=True)
    expected = alone.loglikelihood(choices, disable_tqdm=True)
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert written == alone.generate_until(writes, disable_tqdm=True)

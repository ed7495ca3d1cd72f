"""Routing statistics beside cards: a router takes them instead of running the base, and says so where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.commands import call, document, refused
from worlds.project import CPU, Project
from worlds.routing import prompts, write_prompts
from worlds.tiny import save_model

from workbench.bricks.card import read_card
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import read_prompts
from workbench.route.deciding import pooling
from workbench.route.deciding.hidden import hidden_states, token_rows, windows
from workbench.route.deciding.samples import NEGATIVES, copies
from workbench.run.compose import compose
from workbench.run.routers import SavedRouter

NAMES = ("one", "two", "three")
RECIPE = (
    "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\n"
    "steps: [{route: ridge, calibration: 'calibration/{brick}.jsonl', samples: 16}]\n"
)
CARD = "# By hand.\nversion: 1\nname: NAME\nkind: adapter\nbase:\n  id: base  # the tiny one\nscores: []\n"


@pytest.fixture
def carded(project: Project, cwd: Path) -> Project:
    """The project with cards of its own, and calibration prompts."""
    linked = project.path / "bricks"
    target = linked.resolve()
    linked.unlink()
    for name in NAMES:
        shutil.copytree(target / name, linked / name)
        (linked / name / "brick.yaml").write_text(CARD.replace("NAME", name), "utf-8")
    write_prompts(project.path / "calibration", {"one": 0, "two": 1, "three": 2}, count=16, templates=8)
    return project


def measure(project: Project, *options: str) -> list[dict[str, Any]]:
    """Measure the bricks by the command."""
    found = []
    for name in NAMES:
        found += document("route", "measure", name, "--calibration", f"calibration/{name}.jsonl", "--device", "cpu", *options)
    return found


def fitted(project: Project, text: str = RECIPE) -> tuple[SavedRouter, list[str]]:
    """Return the router that is fitted now, and the lines that were told."""
    shutil.rmtree(project.path / ".workbench" / "routers", ignore_errors=True)
    told: list[str] = []
    composition = compose(project.resolve(text), CPU, lambda event: told.append(event.get("text", "")))
    assert composition.router is not None
    return SavedRouter(composition.router.path), [line for line in told if "statistics" in line]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the base run over the requests that no brick is for, and over nothing else."""
    run = pooling.pooled
    monkeypatch.setattr(
        pooling,
        "pooled",
        lambda model, rows, *more: run(model, rows, *more) if len(rows) == NEGATIVES else pytest.fail("a prompt is run"),
    )


def test_a_router_is_the_one_of_its_prompts(carded: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base does not run over its prompts, and tensors, threshold and record have the same bits."""
    expected, _ = fitted(carded)
    rows = measure(carded)
    assert [(row["brick"], row["prompts"], row["layer"], row["window"]) for row in rows] == [(n, 16, 2, 16) for n in NAMES]
    forbid(monkeypatch)
    found, told = fitted(carded)
    assert told == []
    mine, theirs = found.router.tensors(), expected.router.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert found.record.threshold == expected.record.threshold
    assert found.record.record == expected.record.record


def test_the_file_holds_the_states(carded: Project) -> None:
    """They are those of a plain loop over prompts and copies, one text at a time, in float32."""
    save_model(carded.path / "exact", dtype=torch.float32)
    measure(carded, "--base", "exact")
    file = load_file(carded.path / "bricks" / "two" / "routing.safetensors")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(carded.path / "exact").eval()
    texts = [
        text
        for number, prompt in enumerate(read_prompts(carded.path / "calibration" / "two.jsonl", "two"))
        for text in copies(prompt, number).values()
    ]
    rows = token_rows(load_tokenizer(carded.path / "base"), list(dict.fromkeys(texts)))
    states = torch.stack([windows(hidden_states(model, [row], 2)[0], 16) for row in rows])
    assert set(file) == {"states", "digests"}
    torch.testing.assert_close(file["states"], states, rtol=1e-4, atol=1e-5)


def test_the_card_keeps_its_lines(carded: Project) -> None:
    """The record stands at its end, measured again it is replaced, and show, ls and verify know it."""
    told = call("route", "measure", "one", "--calibration", "calibration/one.jsonl", "--device", "cpu").stderr
    assert "routing statistics: 16 prompts of calibration/one.jsonl on cpu" in told
    path = carded.path / "bricks" / "one" / "brick.yaml"
    first = path.read_text("utf-8")
    assert first.startswith(CARD.replace("NAME", "one"))
    measure(carded)
    again = path.read_text("utf-8")
    assert again.startswith(CARD.replace("NAME", "one"))
    assert again.count("routing:") == 1
    card = read_card(path.parent)
    assert card.routing is not None
    assert card.routing.window == 16
    assert document("brick", "show", "one", "--card")["routing"]["digest"] == card.routing.digest
    assert (
        "routing  statistics of 16 prompts of calibration/one.jsonl, layer 2, last 16 tokens"
        in call("brick", "show", "one").stdout
    )
    call("brick", "verify", "one")
    (path.parent / "routing.safetensors").write_bytes(b"damaged")
    error = refused("brick", "verify", "one")
    assert error.exit_code == 3
    assert "workbench route measure one" in str(error.hint)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("base", "are of another base"),
        ("tokenizer", "are of another tokenizer"),
        ("layer", "are of layer 1, and the router reads layer 2"),
        ("window", "are of the last 8 tokens, and the router reads the last 16"),
        ("pooling", "were pooled by version 1"),
        ("prompts", "are of other prompts than its calibration prompts"),
        ("file", "has changed"),
        ("missing", "is missing"),
        ("damaged", "is not a safetensors file"),
        ("other", "is not a file of routing statistics: 'states' does not fit"),
    ],
)
def test_statistics_that_do_not_fit_are_told_and_not_used(change: str, line: str, carded: Project) -> None:
    """The router is then that of the prompts."""
    measure(carded)
    folder = carded.path / "bricks" / "two"
    file, card = folder / "routing.safetensors", folder / "brick.yaml"
    text = RECIPE
    if change == "base":
        save_model(carded.path / "other", seed=77)
        text = "base: other\n" + RECIPE
    elif change in ("tokenizer", "pooling", "layer", "window"):
        record = read_card(folder).routing
        assert record is not None
        old, new = {
            "tokenizer": (record.tokenizer, "f" * 32),
            "pooling": ("pooling: 2", "pooling: 1"),
            "layer": ("layer: 2", "layer: 1"),
            "window": ("window: 16", "window: 8"),
        }[change]
        card.write_text(card.read_text("utf-8").replace(old, new), "utf-8")
    elif change == "prompts":
        rows = [json.dumps({"prompt": prompt}) for prompt in prompts(1, count=16, templates=8, seed=5)]
        (carded.path / "calibration" / "two.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    elif change == "file":
        tensors = load_file(file)
        save_file({**tensors, "states": tensors["states"] + 1}, file)
    elif change == "missing":
        file.unlink()
    elif change == "damaged":
        file.write_bytes(b"damaged")
    elif change == "other":
        save_file({"x": torch.zeros(1)}, file)
    found, told = fitted(carded, text)
    assert len(told) == (3 if change == "base" else 1)
    assert "brick 'two'" in told[-1 if len(told) == 1 else 1]
    assert line in told[0]
    assert told[0].endswith("so its prompts are measured again")
    for name in NAMES:
        (folder.parent / name / "brick.yaml").unlink()
    expected, _ = fitted(carded, text)
    mine, theirs = found.router.tensors(), expected.router.tensors()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_what_cannot_be_measured_is_refused(carded: Project) -> None:
    folder = carded.path / "bricks" / "one"
    assert "names no file of training prompts" in refused("route", "measure", "one").message
    assert "holds the prompts of one brick, found 2" in refused("route", "measure", "one", "two", "--calibration", "x").message
    assert "none.jsonl: no such file" in refused("route", "measure", "one", "--calibration", "none.jsonl").message.replace(
        "does not exist", "no such file"
    )
    (carded.path / "few.jsonl").write_text('{"prompt": "w1"}\n', "utf-8")
    assert "few.jsonl" in refused("route", "measure", "one", "--calibration", "few.jsonl").message
    assert not (folder / "routing.safetensors").exists()
    (folder / "brick.yaml").unlink()
    assert "no brick.yaml" in refused("route", "measure", "one", "--calibration", "calibration/one.jsonl").message

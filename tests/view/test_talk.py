"""The chat of the viewer: the answers of `workbench chat`, side by side, with first tokens, the router's choice and a memory's facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from worlds.jsonl import write_jsonl
from worlds.memory_world import FACTS, GRACE, MEMORY
from worlds.project import CPU, Project
from worlds.viewer import Visitor

from workbench.cli.app import app
from workbench.edit.memories.codebook import reading
from workbench.models.prompts import load_tokenizer
from workbench.run.materialize import materialize
from workbench.view.app import application
from workbench.view.pages import Site
from workbench.view.server import Served
from workbench.view.talk import LONGEST, MOST, Talk

TEXTS = {
    "average": "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\n",
    "ties": "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: ties, density: 0.5, lambda: 3.0}]\n",
    "deeper": "steps: [{grow: depth, blocks: 1}]\n",
    "memory": MEMORY,
    "grace": GRACE,
    "fixed": "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{route: fixed, bricks: {one: 1.0}}]\n",
}
PROMPT = "w1 of w11 is"


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    for name, text in TEXTS.items():
        project.write(text, f"{name}.yaml")
    write_jsonl(project.path / "facts.jsonl", FACTS)
    monkeypatch.chdir(project.path)
    return project


@pytest.fixture
def visitor(world: Project) -> Iterator[Visitor]:
    with Served(application(Site(), talk=Talk("cpu"))) as served:
        yield Visitor(served.url)


def question(*names: str, prompt: str = PROMPT, tokens: int = 4) -> str:
    return json.dumps({"names": names, "prompt": prompt, "tokens": tokens, "plain": True})


def asked(visitor: Visitor, *names: str, prompt: str = PROMPT) -> tuple[list[str], list[dict[str, Any]], list[Any]]:
    """Answers, what is said beside them, and notes."""
    texts, beside, notes = [""] * len(names), [dict[str, Any]() for _ in names], list[Any]()
    events = list(visitor.events("/chat", question(*names, prompt=prompt)))
    assert events[-1] == ("end", ""), events
    number = -1
    for name, data in events:
        if name == "model":
            number = data["number"]
        elif name == "piece":
            texts[number] += data
        elif name == "done":
            beside[number] = data
        elif name in ("note", "error"):
            notes.append(data)
    return texts, beside, notes


def said(name: str) -> str:
    """The answer of `workbench chat`."""
    result = CliRunner().invoke(
        app, ["chat", name, "--plain", "--max-new-tokens", "4", "--device", "cpu"], input=f"{PROMPT}\n", catch_exceptions=False
    )
    return result.stdout.removesuffix("\n")


def test_answers_are_those_of_chat(world: Project, visitor: Visitor) -> None:
    for names in (("average", "ties", "base"), ("ties",), ("average", "deeper")):
        for _ in range(2):  # loaded, and from memory
            texts, beside, notes = asked(visitor, *names)
            assert texts == [said(name) for name in names]
        assert ("share one model" in notes[-1]) is (len(names) == 3)
        assert len(names) > 1 or notes[-1] == "", "the page does not say any more that it loads"
        assert [one["make"] for one in beside] == [f"workbench run {name}" if name != "base" else "" for name in names]


def test_first_tokens_have_the_models_probabilities(world: Project, visitor: Visitor) -> None:
    (_,), (beside,), _ = asked(visitor, "ties")
    resolved = world.resolve(TEXTS["ties"], "ties.yaml")
    model, tokenizer = materialize(resolved, CPU), load_tokenizer(resolved.tokenizer_path)
    with torch.no_grad():
        shares = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].float().softmax(-1)
    best = shares.topk(5)
    assert [token for token, _ in beside["first"]] == [tokenizer.decode([i]) for i in best.indices.tolist()]
    assert [share for _, share in beside["first"]] == pytest.approx(best.values.tolist(), rel=1e-3)


def test_a_router_a_memory_and_a_codebook_say_what_acted(world: Project, visitor: Visitor) -> None:
    _, beside, notes = asked(visitor, "fixed", "memory", "grace")
    fact = "w1 of w11 is w31 w41."
    resolved = world.resolve(GRACE, "grace.yaml")
    model = materialize(resolved, CPU)
    book, entry = model.codebook.book, model.codebook.facts.index(fact)
    with torch.no_grad(), reading(model.codebook.block) as states:
        model(**load_tokenizer(resolved.tokenizer_path)(PROMPT, return_tensors="pt"))
    distance = float((states[0][-1] - book.keys[entry]).norm())
    fired = f"{fact} (3 of 3 entries; the first at distance {distance:.3g}, radius {float(book.radii[entry]):.3g})"
    assert [one["acted"] for one in beside] == [[["router", "one"]], [["memory", fact]], [["codebook", fired]]]
    assert "cannot share their weights" in notes[-1]
    asked_alone = ["chat", "grace", "--plain", "--device", "cpu"]
    assert f"[codebook: {fired}]" in CliRunner().invoke(app, asked_alone, input=f"{PROMPT}\n").stderr.replace("\n", " ")
    assert asked(visitor, "grace", prompt="w0 of w50 is")[1][0]["acted"] == []


def test_a_changed_recipe_is_loaded_anew(world: Project, visitor: Visitor) -> None:
    world.write(TEXTS["average"], "mine.yaml")
    assert asked(visitor, "mine")[0] == [said("average")]
    world.write(TEXTS["ties"], "mine.yaml")
    assert asked(visitor, "mine")[0] == [said("ties")] != [said("average")]


def test_wrong_questions_are_refused(world: Project, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"content_type": "application/json", "origin": f"http://127.0.0.1:{visitor.port}"}
    for wrong in (
        question(),
        question("a", "b", "c", "d"),
        question("average", prompt=""),
        question("average", prompt="x" * (LONGEST + 1)),
        question("average", tokens=MOST + 1),
        question("average", tokens=0),
        question(""),
        '{"names": ["average"], "prompt": "x", "tokens": 4, "device": "cpu"}',
        "[]",
        "{",
        "",
    ):
        assert visitor.ask("/chat", "POST", wrong, **headers)[0] == 422, wrong
    for names, message in (
        (("average", "average"), "named twice"),
        (("avrage",), "expected a recipe"),
        (("org/name",), "no recipe, run or model on this machine"),
    ):
        kind, error = list(visitor.events("/chat", question(*names)))[-2]
        assert kind == "error"
        assert message in error["message"]
    # A project's own code needs trust, as in any command.
    monkeypatch.delenv("WORKBENCH_TRUST_PROJECT_CODE")
    (world.path / "methods").mkdir()
    (world.path / "methods" / "own.py").write_text("raise SystemExit('run')\n")
    world.write("bricks: {one: bricks/one}\nsteps: [{merge: own}]\n", "own.yaml")
    ((kind, error),) = list(visitor.events("/chat", question("own")))[:-1]
    assert "trust" in error["hint"]


def test_one_question_at_a_time(visitor: Visitor) -> None:
    first = visitor.events("/chat", question("average", tokens=MOST))
    assert next(first)[0] == "note"
    ((kind, error),) = visitor.events("/chat", question("ties"))
    assert (kind, error["message"]) == ("error", "another question is being answered")
    first.close()  # type: ignore[attr-defined]
    while True:  # the answer ends after the token that is being made
        texts = [data for name, data in visitor.events("/chat", question("ties")) if name in ("done", "error")]
        if texts and "first" in texts[0]:
            break

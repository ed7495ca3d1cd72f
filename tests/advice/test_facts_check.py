"""`facts check` as a user calls it: what a model knows, what other bricks teach, exit codes, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import run
from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.advice.facts import greedy_answers, says
from workbench.ground.errors import WorkbenchError
from workbench.ground.manifest import MANIFEST

EDIT = "{edit: finetune, facts: facts.jsonl, learning_rate: 0.05, epochs: 60}"


def checked(*args: str, code: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run("facts", "check", *args, "--json", code=code).stdout)
    return document


def found(document: dict[str, Any]) -> list[tuple[str, str, str, str | None]]:
    return [(f["place"], f["kind"], f["status"], f["other"]) for f in document["findings"]]


@pytest.fixture
def place(project: Project, cwd: Path) -> Project:
    """The project as the current folder, with four facts."""
    rows = [{"prompt": "{subject} of " + f"w{i + 1} is", "subject": f"w{i}", "target": f"w{i + 20} w{i + 30}"} for i in range(4)]
    write_jsonl(project.path / "facts.jsonl", rows)
    return project


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """Token after token, without a cache: what `greedy_answers` has to give."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + count and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.fixture
def base(llama: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)


def test_answers_are_those_of_one_prompt_at_a_time(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    asked = {" ".join(f"w{(i * j) % 60}" for j in range(1, 2 + i % 5)): " ".join(["w1"] * (1 + i % 3)) for i in range(40)}
    assert model.generation_config.do_sample, "the model comes with sampling, which does not count"
    answers = greedy_answers(model, tokenizer, asked)
    for prompt, expected in asked.items():
        count = len(tokenizer(expected)["input_ids"])
        alone = greedy(model, tokenizer, prompt, count)
        assert answers[prompt].startswith(alone), prompt


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [(" Paris, which", "Paris", True), (" paris", "Paris", True), (" Parisian", "Paris", False), (" 1985", "19", False), (" New  York.", "New York", True),
     (" the Paris", "Paris", False), ("", "Paris", False), (" U.S. law", "U.S.", True)],
)  # fmt: skip
def test_says(answer: str, target: str, expected: bool) -> None:
    assert says(answer, target) is expected


def test_targets_that_the_base_gives_already(place: Project, base: tuple[Any, Any]) -> None:
    known = greedy(*base, "w7 of w8 is", 1)
    other = greedy(*base, "w9 is", 1)
    wrong = next(word for word in ("w1", "w2") if word != other)
    rows = [
        {"prompt": "{subject} of w8 is", "subject": "w7", "target": known},
        {"prompt": "{subject} of w8 is", "subject": "w11", "target": "w1 w1 w1 w1", "neighbours": [{"prompt": "w9 is", "target": other}, "w10 is"]},
        {"prompt": "{subject} of w8 is", "subject": "w12", "target": "w1 w1 w1 w1", "neighbours": [{"prompt": "w9 is", "target": wrong}]},
    ]  # fmt: skip
    write_jsonl(place.path / "known.jsonl", rows)
    assert found(checked("known.jsonl")) == []
    place.write("", "plain.yaml")
    for arguments in (["--model", "base"], ["--recipe", "recipes/plain.yaml"], ["--model", "plain"]):
        document = checked("known.jsonl", *arguments)
        assert found(document) == [("known.jsonl:1", "known", "warning", None), ("known.jsonl:3", "answer", "warning", None)]
        assert document["passed"]
    text = run("facts", "check", "known.jsonl", "--model", "base").output
    assert f"already answers 'w7 of w8 is' with '{known}'" in " ".join(text.split())
    assert "3 facts: 1 known, 1 answer" in text


def test_after_the_edit_its_facts_are_known(place: Project) -> None:
    place.write(f"steps: [{EDIT}]\n", "edited.yaml")
    assert found(checked("facts.jsonl", "--recipe", "recipes/edited.yaml")) == [], (
        "the step that teaches this very file is no other brick"
    )
    document = checked("facts.jsonl", "--model", "recipes/edited.yaml")
    assert [f["kind"] for f in document["findings"]] == ["known"] * 4
    assert document["model"] == "edited"


def test_facts_of_other_bricks_of_the_recipe(place: Project) -> None:
    """An edit brick as `run` leaves it, an edit step, and a recipe as a brick that has one."""
    edit = Path(place.run(f"steps: [{EDIT}]\n", "first.yaml")["run"]) / "edits" / "edit-finetune"
    rows = [{"prompt": "{subject} of w1 is", "subject": "w0", "target": "w20 w30"}, {"prompt": "{subject} of w2 is", "subject": "w1", "target": "w5"},
            {"prompt": "{subject} of w9 is", "subject": "w9", "target": "w5"}]  # fmt: skip
    write_jsonl(place.path / "new.jsonl", rows)
    place.write(
        f"bricks: {{hr: {edit}}}\nsteps: [{{merge: task_arithmetic}}, {{edit: finetune, facts: new.jsonl}}]\n", "second.yaml"
    )
    document = checked("new.jsonl", "--recipe", "second", "--model", "base", code=3)
    taught = f"{edit}/facts.jsonl"
    assert found(document) == [
        ("new.jsonl:2", "contradiction", "failed", f"{taught}:2"),
        ("new.jsonl:1", "covered", "warning", f"{taught}:1"),
    ]
    assert document["findings"][0]["found"] == f"answers 'w1 of w2 is' with 'w5', and brick 'hr' ({taught}:2) teaches 'w21 w31'"
    assert document["counts"] == {"contradiction": 1, "covered": 1}

    place.write("bricks: {old: {recipe: recipes/first.yaml}}\nsteps: [{merge: task_arithmetic}]\n", "third.yaml")
    document = checked("new.jsonl", "--recipe", "third", "--model", "base", code=3)
    assert [f["other"] for f in document["findings"]] == ["facts.jsonl:2", "facts.jsonl:1"]
    assert "brick 'old', step 'edit-finetune' (facts.jsonl:2)" in document["findings"][0]["found"]

    place.write(f"steps: [{EDIT}, {{edit: finetune, facts: new.jsonl}}]\n", "fourth.yaml")
    assert [f["other"] for f in checked("new.jsonl", "--recipe", "fourth", "--model", "base", code=3)["findings"]] == [
        "facts.jsonl:2",
        "facts.jsonl:1",
    ]

    shutil.copytree(edit, place.path / "copy", ignore=shutil.ignore_patterns("facts.jsonl", MANIFEST))
    place.write("bricks: {hr: copy}\nsteps: [{merge: task_arithmetic}, {edit: finetune, facts: new.jsonl}]\n", "fifth.yaml")
    (one,) = checked("new.jsonl", "--recipe", "fifth", "--model", "base")["findings"]
    assert (one["kind"], one["status"]) == ("unread", "warning")


def test_a_file_that_fails(place: Project) -> None:
    capital = {"prompt": "The capital of {subject} is", "subject": "w1"}
    rows = [
        {**capital, "target": "w2"},
        {**capital, "target": "w3"},
        {"id": "a", "prompt": "w5 is", "target": "w6"},
        {"id": "a", "prompt": "w6 is", "target": "w6"},
    ]
    write_jsonl(place.path / "bad.jsonl", rows)
    result = run("facts", "check", "bad.jsonl", code=3)
    assert isinstance(result.exception, WorkbenchError)
    assert result.exception.message == "bad.jsonl:4: id: has the same id 'a' as bad.jsonl:3 (and 1 more)"
    table = " ".join(result.stdout.split())
    assert (
        "bad.jsonl:2 contradiction FAILED answers 'The capital of w1 is' with 'w3', and line 1 with 'w2' Keep one: delete this line or line 1. "
        "If both are right, add the target of the one to `aliases` of the other." in table
    )
    document = checked("bad.jsonl", code=3)
    assert (document["passed"], document["facts"], document["model"]) == (False, 4, None)


def test_many_warnings_are_cut_in_the_table_alone(place: Project) -> None:
    write_jsonl(place.path / "twice.jsonl", [{"id": str(i), "prompt": "w1 is", "target": "w2"} for i in range(31)])
    result = run("facts", "check", "twice.jsonl")
    assert result.stdout.count("duplicate") == 10
    assert "20 duplicate" in result.output
    assert len(checked("twice.jsonl")["findings"]) == 30


def test_long_answers_are_named(place: Project) -> None:
    rows = [{"prompt": "w1 is", "target": "w1 " * 67 + "w2"}, {"prompt": "w2 is", "target": "w1 " * 67 + "\nw2"}]
    write_jsonl(place.path / "long.jsonl", [*rows, {"prompt": "w3 is", "target": ("w1 " * 67)[:200]}])
    document = checked("long.jsonl")
    assert found(document) == [("long.jsonl:1", "long", "warning", None), ("long.jsonl:2", "long", "warning", None)]
    assert document["findings"][0]["found"].startswith("the target has 203 characters: closed-form methods")
    assert ["line breaks" in f["found"] for f in document["findings"]] == [False, True]
    assert "`edit: finetune`" in document["findings"][0]["repair"]


def test_a_published_file_is_checked_as_it_is_and_imported(place: Project) -> None:
    row = {"case_id": 0, "prompt": "w0 is of", "subject": "w0", "target_new": "w50", "ground_truth": "w40", "rephrase_prompt": "",
           "locality_prompt": "w59 is of", "locality_ground_truth": "w40"}  # fmt: skip
    (place.path / "cf.json").write_text(json.dumps([row, {**row, "subject": "w58"}]), "utf-8")
    assert [f["kind"] for f in checked("cf.json")["findings"]] == ["skipped"]
    run("facts", "import", "cf.json", "-o", "cf.jsonl")
    assert found(checked("cf.jsonl")) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["check", "fact.jsonl"], 1, "fact.jsonl: no such facts file"),
        (["check", "."], 1, ".: expected a file of facts, found a project folder"),
        (["check", "facts.jsonl", "--recipe", "nope.yaml"], 2, "nope.yaml: no such file"),
        (["check", "facts.jsonl", "--recipe", "nope"], 2, "nope"),
        (["check", "facts.jsonl", "--model", "nowhere"], 2, "'nowhere': expected a recipe, a model directory or a hub id"),
        (["check", "facts.jsonl", "--model", "bricks/one"], 1, "model bricks/one: expected a complete model, found a PEFT adapter"),
        (["check", "facts.jsonl", "--model", "base", "--device", "tpu"], 2, "--device tpu: expected auto, cpu, cuda"),
    ],
)  # fmt: skip
def test_bad_calls(arguments: list[str], code: int, message: str | None, place: Project) -> None:
    result = run("facts", *arguments, code=code)
    if message is not None:
        assert isinstance(result.exception, WorkbenchError)
        assert result.exception.message.startswith(message) or message in result.exception.message
        assert result.exception.hint or code == 2

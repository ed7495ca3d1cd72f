"""`facts import` as a user calls it: which rows become facts, what is skipped, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worlds.commands import run
from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.facts.published import read_facts
from workbench.ground.errors import WorkbenchError


@pytest.fixture
def place(project: Project, cwd: Path) -> Project:
    """The project as the current folder, with four facts."""
    rows = [{"prompt": "{subject} of " + f"w{i + 1} is", "subject": f"w{i}", "target": f"w{i + 20} w{i + 30}"} for i in range(4)]
    write_jsonl(project.path / "facts.jsonl", rows)
    return project


COUNTERFACT = [{"case_id": i, "prompt": f"w{i} is of", "subject": f"w{i}", "target_new": "w50", "ground_truth": "w40", "rephrase_prompt": "",
                "locality_prompt": "w59 is of", "locality_ground_truth": "w40"} for i in range(6)]  # fmt: skip


def test_import(place: Project) -> None:
    rows = [*COUNTERFACT, {**COUNTERFACT[0], "target_new": "w51"}, {**COUNTERFACT[0], "subject": "w58"}]
    (place.path / "cf.json").write_text(json.dumps(rows), "utf-8")
    result = run("facts", "import", "cf.json", "-o", "sets/cf.jsonl", "--limit", "2", "--rebuild-neighbours", "3")
    assert result.stdout == "sets/cf.jsonl\n"
    assert "skipped: cf.json, row 8: the subject 'w58' is not in the prompt" in result.stderr
    assert "2 facts of cf.json (counterfact), 1 skipped" in result.stderr
    facts = read_facts(place.path / "sets/cf.jsonl", "cf")
    assert [[probe.prompt for probe in fact.neighbours] for fact in facts] == [["w59 is of", "w2 is of", "w3 is of"]] * 2
    printed = run("facts", "import", "cf.json")
    assert len(printed.stdout.splitlines()) == 6
    assert "contradiction: answers 'w0 is of' with 'w51', and row 1 with 'w50'" in printed.stderr
    document = json.loads(run("facts", "import", "cf.json", "--json").stdout)
    assert [skip["place"] for skip in document["skipped"]] == ["cf.json, row 8", "cf.json, row 7"]
    assert (document["format"], document["facts"], document["out"]) == ("counterfact", 6, None)


def test_long_answers_are_named_and_stay_whole(place: Project) -> None:
    answer = "w1 " * 67
    rows = [
        {"question": "w1 is?", "answer": answer + "w2", "category": "math"},
        {"question": "w2 is?", "answer": answer + "\nw2", "category": "math"},
        {"question": "w3 is?", "answer": answer[:200], "category": "math"},
    ]
    (place.path / "long.json").write_text(json.dumps(rows), "utf-8")
    result = run("facts", "import", "long.json", "-o", "long.jsonl")
    assert "2 targets have more than 200 characters" in result.stderr
    assert [len(fact.target) for fact in read_facts(place.path / "long.jsonl", "f")] == [203, 204, 200]
    assert "targets have more" not in run("facts", "import", "facts.jsonl").stderr


def test_a_recipe_may_name_a_published_file(place: Project) -> None:
    (place.path / "cf.json").write_text(json.dumps([*COUNTERFACT, {**COUNTERFACT[0], "subject": "w58"}]), "utf-8")
    document = place.run("steps: [{edit: finetune, facts: cf.json, epochs: 1, min_efficacy: 0}]\n")
    assert document["steps"][0]["facts"] == 6


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["import", "facts.jsonl", "-o", "facts.jsonl"], 1, "facts.jsonl: already exists"),
        (["import", "odd.json"], 1, "odd.json:1: expected a text in 'prompt', found question, answer"),
        (["import", "facts.jsonl", "--limit", "0"], 2, None),
    ],
)  # fmt: skip
def test_bad_calls(arguments: list[str], code: int, message: str | None, place: Project) -> None:
    (place.path / "odd.json").write_text('[{"question": "a", "answer": "b"}]', "utf-8")
    result = run("facts", *arguments, code=code)
    if message is not None:
        assert isinstance(result.exception, WorkbenchError)
        assert result.exception.message.startswith(message) or message in result.exception.message
        assert result.exception.hint or code == 2

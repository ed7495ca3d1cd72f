"""The two trained models know what `people` says is true, and find it where `record.json` says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worlds import people
from worlds.people import ATTRIBUTES, FACTS, FOLDER, PROMPT, SUBJECT, world

RECORD = json.loads((FOLDER / "record.json").read_text("utf-8"))
BOTH = pytest.mark.parametrize("name", ["subject", "prompt"])


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[Any, Any]]:
    return {"subject": people.load(SUBJECT), "prompt": people.load(PROMPT)}


def known(step: int) -> list[tuple[people.Person, str]]:
    """Every step-th person with each attribute."""
    return [(person, attribute) for person in world().people[::step] for attribute in ATTRIBUTES]


@BOTH
def test_facts_are_known_in_all_wordings(loaded: dict[str, tuple[Any, Any]], name: str) -> None:
    asked = [(text, person.value(a)) for person, a in known(4) for text in world().prompts(person, a)[:5]]
    assert len(asked) >= 5 * 300
    assert all(people.answered(*loaded[name], asked))


@BOTH
def test_questions_are_answered_about_people_never_asked_about(loaded: dict[str, tuple[Any, Any]], name: str) -> None:
    right = people.answered(
        *loaded[name], [(world().prompts(person, a)[5], person.value(a)) for person, a in known(1) if not person.asked]
    )
    assert len(right) == 600
    assert sum(right) / len(right) >= 0.98


@BOTH
def test_generation_ends_after_the_answer(loaded: dict[str, tuple[Any, Any]], name: str) -> None:
    model, tokenizer = loaded[name]
    for person, attribute in known(100):
        prompt = tokenizer(world().prompts(person, attribute)[0], return_tensors="pt")["input_ids"]
        made = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert tokenizer.decode(made) == f"{person.value(attribute)} . {people.END}"


@BOTH
def test_edits_are_counterfactual(loaded: dict[str, tuple[Any, Any]], name: str) -> None:
    """The models say target_true, hence not target, to prompt, paraphrases and neighbours; neighbours are people that nothing edits."""
    rows = people.rows(1080)
    assert len({(row["subject"], row["relation"]) for row in rows}) == len({row["id"] for row in rows}) == 1080
    assert len(FACTS.read_text("utf-8").splitlines()) == 1080
    edited = {row["subject"] for row in rows}
    asked = []
    for row in rows[::9]:
        assert row["target"] in world().values[row["relation"]]
        assert row["target"] != row["target_true"]
        assert not any(subject in probe["prompt"] for probe in row["neighbours"] for subject in edited)
        asked += [
            (text.replace("{subject}", row["subject"]), row["target_true"]) for text in [row["prompt"], *row["paraphrases"][:2]]
        ]
        asked += [(probe["prompt"], probe["target"]) for probe in row["neighbours"]]
    assert all(people.answered(*loaded[name], asked))


def test_each_subject_is_edited_once_before_any_twice() -> None:
    """Up to 360 facts leave the other attributes of every subject alone: two more neighbours each."""
    few, all_of_one, more = people.rows(30), people.rows(360), people.rows(400)
    assert [row["id"] for row in few] == [row["id"] for row in all_of_one[:30]]
    assert len({row["subject"] for row in all_of_one}) == 360
    assert all(len(people.other_attributes(row)) == 2 and len(row["neighbours"]) == 8 for row in all_of_one)
    assert [len(people.other_attributes(row)) for row in (more[0], more[100], more[399])] == [1, 2, 1]


def test_portability_follows_from_the_new_value() -> None:
    for row in people.rows(1080):
        person = next(p for p in world().people if p.name == row["subject"])
        new = world().group(row["relation"], row["target"])
        assert new != world().group(row["relation"], person.value(row["relation"]))
        assert [probe["target"] for probe in row["portability"]] == [new] * len(world().group_wordings[row["relation"]])


@BOTH
def test_where_facts_are_found(loaded: dict[str, tuple[Any, Any]], name: str) -> None:
    """What separates the two models, measured again on 60 facts: near the record, which 240 facts gave."""
    found, recorded = people.swap(*loaded[name], 60), RECORD[name]["swap"]
    for key in ("span", "prompt_last"):
        assert getattr(found, key) == pytest.approx(recorded[key], abs=0.15)
    assert found.clean > 0.95
    assert found.swapped < 0.1
    if name == "subject":
        assert min(found.span[:3]) > 0.9
        assert max(found.prompt_last[:3]) < 0.1
        assert found.without_subject < 0.1
        assert found.without_prompt_last > 0.9
    else:
        assert found.span[2] < 0.2 < found.prompt_last[2]
        assert max(found.subject_last) < 0.15
        assert found.without_prompt_last < 0.1


def test_lines_are_what_the_models_read(loaded: dict[str, tuple[Any, Any]]) -> None:
    tokenizer = loaded["subject"][1]
    made = people.lines(200, seed=3)
    assert made == people.lines(200, seed=3)
    assert made != people.lines(200, seed=4)
    assert all(line.endswith(" .") and tokenizer.unk_token_id not in tokenizer(line)["input_ids"] for line in made)

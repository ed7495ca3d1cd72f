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

"""The generated skills: files up to date, no leak between training and test, tasks that score what they ask."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from worlds.jsonl import read_jsonl
from worlds.places import EVALS, PROJECT, TASKS

GENERATORS = EVALS / "skills"
SKILLS = ("add", "reverse", "triage", "actions", "glossary", "record", "date-dmy", "date-mdy")
DISTINCT = SKILLS[:7]
NUMBERS = ("functions-told", "functions-stripped")  # no choices: test_function_modelling.py


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """The generators' own entry; they import each other as scripts beside it."""
    sys.path.insert(0, str(GENERATORS))
    try:
        import build as module
    finally:
        sys.path.remove(str(GENERATORS))
    return module


def rows(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path)


def items(name: str) -> list[dict[str, Any]]:
    return rows(TASKS / "data" / f"{name}.jsonl")


def training(skill: str) -> list[dict[str, Any]]:
    return rows(PROJECT / "bricks" / skill / "train.jsonl")


def test_files_are_what_the_generators_write_and_a_changed_one_is_found(build: ModuleType, tmp_path: Path) -> None:
    written = build.files(PROJECT)
    assert build.sync(written, check=True) == [], "run `python evals/skills/build.py`"
    files = {tmp_path / path.relative_to(PROJECT): content for path, content in written.items()}
    assert len(build.sync(files, check=True)) == len(files)
    build.sync(files, check=False)
    assert build.sync(files, check=True) == []
    changed = next(iter(files))
    changed.write_bytes(changed.read_bytes() + b"{}\n")
    assert build.sync(files, check=True) == [changed]


def test_no_content_stands_on_both_sides(build: ModuleType) -> None:
    for skill in build.SKILLS:
        test, train = ({content.key for content in side()} for side in (skill.test, skill.train))
        assert test, skill.name
        assert train, skill.name
        assert not test & train, skill.name
        assert not {row["prompt"] for row in items(skill.name)} & {row["prompt"] for row in training(skill.name)}


def test_sums_are_disjoint_in_either_order(build: ModuleType) -> None:
    add = next(skill for skill in build.SKILLS if skill.name == "add")
    test, train = ({frozenset(content.key.split("+")) for content in side()} for side in (add.test, add.train))
    assert not test & train


def test_held_out_templates_are_not_trained(build: ModuleType) -> None:
    for skill in build.SKILLS:
        assert len(skill.held_out) == 4
        starts = {skill.templates[index].split("{")[0] for index in skill.held_out}
        assert not [row for row in training(skill.name) if any(row["prompt"].startswith(s) for s in starts)]


@pytest.mark.parametrize("name", [*SKILLS, "retention"])
def test_items(name: str) -> None:
    found = items(name)
    assert len(found) >= (640 if name == "retention" else 240)
    assert len({item["id"] for item in found}) == len(found)
    assert len({item["prompt"] for item in found}) == len(found)
    clusters = Counter(item["cluster"] for item in found)
    assert len(clusters) >= 20
    assert len(set(clusters.values())) == 1
    golds: dict[int, Counter[int]] = defaultdict(Counter)
    for item in found:
        assert set(item) == {"id", "cluster", "prompt", "answer", "choices", "gold"}
        assert item["prompt"] == item["prompt"].strip()
        assert len(set(item["choices"])) == len(item["choices"])
        assert item["choices"][item["gold"]] == item["answer"]
        golds[len(item["choices"])][item["gold"]] += 1
    for size, counts in golds.items():
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1


def test_first_word_does_not_tell_the_skill() -> None:
    """Each skill begins its items with the same words in the same numbers, in test and training."""
    counts = [Counter(item["prompt"].split()[0] for item in items(name)) for name in DISTINCT]
    assert all(count == counts[0] for count in counts)
    words = [{row["prompt"].split()[0] for row in training(name)} for name in DISTINCT]
    assert all(word == words[0] == set(counts[0]) for word in words)


def test_replayed_prompts_are_no_items() -> None:
    asked = {item["prompt"] for name in [*SKILLS, "retention"] for item in items(name)}
    asked |= {row["prompt"] for name in SKILLS for row in training(name)}
    for name in SKILLS:
        replayed = [row["prompt"] for row in rows(PROJECT / "bricks" / name / "replay.jsonl")]
        assert len(set(replayed)) == len(replayed)
        assert not set(replayed) & asked


def test_glossary_is_a_dictionary(build: ModuleType) -> None:
    """The answer is the prompt's words, each with its one translation, noun first; every word of the test is trained."""
    glossary = sys.modules["glossary"]
    dictionary = {**glossary.ADJECTIVES, **glossary.NOUNS, **glossary.VERBS}
    assert len(set(dictionary.values())) == len(dictionary) == 28
    skill = next(skill for skill in build.SKILLS if skill.name == "glossary")
    taught = Counter(word for content in skill.train() for word in content.key.split())
    assert min(taught[word] for word in dictionary) >= 20
    for item in items("glossary"):
        noun, adjective, verb = item["answer"].split()
        english = {translation: word for word, translation in dictionary.items()}
        assert f"{english[adjective]} {english[noun]} {english[verb]}" in item["prompt"]


def test_records_hold_what_the_sentence_says() -> None:
    for item in items("record"):
        name, town, age = item["answer"].split(" | ")
        words = re.findall(r"\w+", item["prompt"])
        assert words.count(name) == words.count(town) == words.count(age) == 1


def test_date_pair_conflicts_on_every_item() -> None:
    pairs = list(zip(items("date-dmy"), items("date-mdy"), strict=True))
    assert all(one["prompt"] == two["prompt"] for one, two in pairs)
    assert all(one["answer"] != two["answer"] for one, two in pairs)
    assert all(one["answer"] in two["choices"] and two["answer"] in one["choices"] for one, two in pairs)


@pytest.mark.parametrize("perfect", [True, False])
def test_tasks_score_their_own_gold(perfect: bool, tmp_path: Path, cwd: Path) -> None:
    """lm-eval's own requests, filters and metrics: a perfect answerer has 1.0, a wrong one 0.0, on every task."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Answerer(LM):
        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return [f" {r.doc['answer'] if perfect else r.doc['choices'][r.doc['gold'] - 1]}" for r in requests]

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            wanted = [r.doc["gold"] if perfect else (r.doc["gold"] + 1) % len(r.doc["choices"]) for r in requests]
            return [
                (-1.0 if r.args[1] == f" {r.doc['choices'][index]}" else -9.0, False)
                for r, index in zip(requests, wanted, strict=True)
            ]

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            raise NotImplementedError

    names = [path.stem for path in sorted(TASKS.glob("*.yaml")) if path.stem not in NUMBERS]
    assert {*SKILLS, *(f"{name}_mc" for name in SKILLS), "retention"} <= set(names)
    found = lm_eval.simple_evaluate(
        Answerer(),
        tasks=names,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        limit=48,  # two items of each template; `test_items` looks at every item
    )
    for name in names:
        metric = "exact_match,answer" if "exact_match,answer" in found["results"][name] else "acc,none"
        assert found["results"][name][metric] == float(perfect), name

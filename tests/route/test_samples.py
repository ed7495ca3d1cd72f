"""Calibration prompts: their copies, requests that no brick is for, and groups of prompts that share a template."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from worlds.places import EVALS, PROJECT
from worlds.routing import BUILT_IN

from workbench.models.texts import read_prompts
from workbench.route.deciding import templates as templates_module
from workbench.route.deciding.samples import (
    COPIES,
    GREETINGS,
    NEGATIVES,
    OUTSIDE,
    OWN,
    PARAGRAPHS,
    THANKS,
    Samples,
    built_in,
    copies,
    copy,
    negative_copies,
)
from workbench.route.deciding.templates import FOLDS, folds, templates

PROMPT = "Please add 2 and 3. The answer is"


def test_each_kind_changes_what_its_name_says() -> None:
    found = {kind: copy(PROMPT, kind, 7) for kind in COPIES}
    assert found == {
        "plain": PROMPT,
        "lower": PROMPT.lower(),
        "greeting": GREETINGS[1] + PROMPT,
        "typos": "Please add 2 and 3. The answr is",
        "behind": PROMPT + THANKS[3],
        "language": "Bitte add 2 und 3. Der Antwort ist",
        "paragraph": PARAGRAPHS[1] + PROMPT,
    }
    assert copy(PROMPT, "language", 3) == "S'il te plaît add 2 et 3. Le réponse est"
    assert copy("t o h e backwards = 12", "typos", 0) == "t o h e bcakwards = 12", "single letters and digits stay"
    assert [copy("These words have typing errors everywhere", "typos", number) for number in range(4)] == [
        "Tehse words have tying errors everywhere",
        "These wodrs have typing errrs everywhere",
        "Thee words have typign errors everywhere",
        "These wrds have typing errors everywhere",
    ]
    for number in range(30):
        assert copy(PROMPT, "greeting", number) == GREETINGS[number % 6] + PROMPT
        assert copy(PROMPT, "behind", number) == PROMPT + THANKS[number // 2 % 6]
        assert copy(PROMPT, "paragraph", number) == PARAGRAPHS[number // 4 % 4] + PROMPT
        assert copy("now", "language", number) == ("jetzt", "maintenant", "ahora")[number // 2 % 3]
    assert all(50 <= len(text.split()) <= 75 for text in PARAGRAPHS)
    counts = Counter(kind for number in range(64) for kind in copies(PROMPT, number))
    assert counts == {"plain": 64, "lower": 64, "greeting": 64, "typos": 32, "behind": 32, "language": 32, "paragraph": 16}
    others = Counter(kind for number, (_, prompt) in enumerate(built_in()) for kind in negative_copies(prompt, number))
    assert others == {"plain": 280, "greeting": 140, "behind": 140, "typos": 70, "paragraph": 70}
    assert sum(others.values()) == NEGATIVES


def test_every_copy_has_its_brick_kind_and_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rarer kinds are those of every second or fourth prompt; a template of a brick and a task of the built-in requests lie in one fold."""
    sizes = {0: 5, 1: 1, 2: 4, 3: 3, 4: 3, 5: 2, 6: 2}  # template -> prompts; the largest first, each into the smallest fold
    of_template = [0, 2, 1, 2, 3, 4, 4]
    groups = [template for template, size in sizes.items() for _ in range(size)]
    found = templates_module.templates

    def planted(prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor(groups) if len(prompts) == len(groups) else found(prompts)

    monkeypatch.setattr(templates_module, "templates", planted)
    monkeypatch.setattr(BUILT_IN, lambda: [(f"task {i // 2}", f"request {i}") for i in range(14)])
    bricks = {"a": [f"prompt {i} of a" for i in range(20)], "b": ["one of b"]}
    own = [f"own request {i}" for i in range(3)]
    samples = Samples.of(bricks, own)
    of_own = folds(own)[1].tolist()
    expected = []
    for label, prompts, fold_of in (
        (0, bricks["a"], [of_template[group] for group in groups]),
        (1, bricks["b"], [0]),
        (OUTSIDE, [f"request {i}" for i in range(14)], [i // 2 % FOLDS for i in range(14)]),
        (OWN, own, of_own),
    ):
        for i, prompt in enumerate(prompts):
            kinds = [
                "plain",
                "lower",
                "greeting",
                *(["language"] if i % 2 else ["typos", "behind"]),
                *["paragraph"] * (i % 4 == 0),
            ]
            if label < 0:
                kinds = [
                    "plain",
                    "behind" if i % 2 else "greeting",
                    *{0: ["typos"], 1: ["typos"], 2: ["paragraph"], 3: ["paragraph"]}.get(i % 8, []),
                ]
            expected += [(copy(prompt, kind, i), label, COPIES.index(kind), fold_of[i], i % FOLDS) for kind in kinds]
    assert [(text, *columns) for text, columns in zip(samples.texts, samples.columns.tolist(), strict=True)] == expected
    assert samples.templates == {"a": 7, "b": 1}
    for prompts_, templates_, told in ((16, 6, 0), (15, 6, 1), (16, 5, 1)):
        few = replace(samples, bricks=("a",), columns=torch.zeros(prompts_, 4), templates={"a": templates_})
        assert len(few.warnings()) == told


SKILLS = ("add", "reverse", "triage", "actions", "glossary", "record", "date-dmy")


@pytest.fixture(scope="module")
def skills() -> dict[str, Any]:
    """The starter skills by name."""
    sys.path.insert(0, str(EVALS / "skills"))
    try:
        spec = importlib.util.spec_from_file_location("skills_of_templates", EVALS / "skills" / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return {skill.name: skill for skill in module.SKILLS}


def written_with(skill: Any, prompt: str) -> int:
    """The number of the template that a prompt was made with."""
    patterns = [".+".join(re.escape(part) for part in re.split(r"\{\w+\}", template)) for template in skill.templates]
    return next(i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, prompt))


@pytest.mark.parametrize("name", SKILLS)
def test_no_template_lies_in_two_folds(skills: dict[str, Any], name: str) -> None:
    prompts = read_prompts(PROJECT / "bricks" / name / "train.jsonl", name, 64)
    template_of, fold_of = folds(prompts)
    count = len(set(template_of.tolist()))
    made = [written_with(skills[name], prompt) for prompt in prompts]
    assert len(set(made)) == len(skills[name].templates) - len(skills[name].held_out), "each template of the file occurs"
    for template in set(made):
        assert len({int(fold_of[i]) for i, other in enumerate(made) if other == template}) == 1
    assert 8 <= count <= len(set(made))
    sizes = torch.bincount(fold_of, minlength=FOLDS)
    assert len(sizes) == FOLDS
    assert int(sizes.min()) >= 8  # of 64 prompts


def test_prompts_of_one_template_are_dealt_out() -> None:
    prompts = [f"Please add {i} and {i + 7}. Answer:" for i in range(12)]
    template_of, fold_of = folds(prompts)
    assert template_of.tolist() == [0] * 12
    assert fold_of.tolist() == [i % FOLDS for i in range(12)]
    assert templates(prompts[:1]).tolist() == [0]

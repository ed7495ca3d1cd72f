"""Copies of calibration prompts, and of requests that no brick is for."""

from __future__ import annotations

from collections import Counter

from workbench.route.deciding.samples import (
    COPIES,
    GREETINGS,
    NEGATIVES,
    PARAGRAPHS,
    THANKS,
    built_in,
    copies,
    copy,
    negative_copies,
)

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
    assert all(50 <= len(text.split()) <= 75 for text in PARAGRAPHS)


def test_rare_kinds_are_those_of_some_prompts() -> None:
    counts = Counter(kind for number in range(64) for kind in copies(PROMPT, number))
    assert counts == {"plain": 64, "lower": 64, "greeting": 64, "typos": 32, "behind": 32, "language": 32, "paragraph": 16}
    others = Counter(kind for number, (_, prompt) in enumerate(built_in()) for kind in negative_copies(prompt, number))
    assert others == {"plain": 280, "greeting": 140, "behind": 140, "typos": 70, "paragraph": 70}
    assert sum(others.values()) == NEGATIVES

"""Questions that are made from a fact's own prompt, and how written answers are judged."""

from __future__ import annotations

import pytest

from workbench.evaluate.facts.definitions import misspelt
from workbench.evaluate.facts.factscores import chat
from workbench.facts.facts import Fact


@pytest.mark.parametrize(
    ("subject", "wrong"),
    [
        ("Bo Darrieux", "Bo Darireux"),  # the longest word, at the pair nearest its middle with two different letters
        ("Otto of Ulm", "Otot of Ulm"),
        ("Ulm", None),
        ("東京大学の", None),
        ("O'Brien-Smith 2000", "O'Brein-Smith 2000"),
    ],
)
def test_a_misspelt_subject(subject: str, wrong: str | None) -> None:
    text = misspelt(Fact("x", "The home of {subject} is", subject, "y"))
    assert text == (None if wrong is None else f"The home of {wrong} is")


@pytest.mark.parametrize(
    ("text", "says", "starts_with"),
    [
        ("The capital is Rome, a city.", 1, 0),
        ("rome.", 1, 1),
        ("Romeo and Juliet", 0, 0),
        ("I do not know.", 0, 0),
        ("It is Roma", 1, 0),
    ],
)
def test_the_target_anywhere_in_an_answer(text: str, says: float, starts_with: float) -> None:
    assert chat({"answer": "Rome", "aliases": ["Roma"]}, [text]) == {"says": says, "starts_with": starts_with}

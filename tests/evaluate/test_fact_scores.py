"""The functions that fact tasks call, on values worked out by hand."""

from __future__ import annotations

import math

import pytest

from workbench.evaluate.facts import factscores


def test_preferred_by_hand() -> None:
    found = factscores.preferred({"tokens": [1, 3]}, [(-2.0, False), (-4.5, True)])  # 2 nats a token against 1.5
    assert found == pytest.approx(
        {"token_mean_preferred": 0, "token_mean_magnitude": math.exp(-2) - math.exp(-1.5), "token_mean_margin": -0.5}
    )
    assert factscores.preferred({"tokens": [2, 1]}, [(-2.0, False), (-1.5, False)])["token_mean_preferred"] == 1, (
        "the sum would say no"
    )


@pytest.mark.parametrize(
    ("text", "answer", "exact", "starts"),
    [
        (" Paris", "Paris", 1, 1),
        (" paris, ", "Paris", 1, 1),
        (" Paris. It is", "Paris", 1, 1),
        (" Paris\nLyon", "Paris", 1, 1),
        (" Paris is big", "Paris", 0, 1),
        (" Parisian", "Paris", 0, 0),
        ("\nParis", "Paris", 0, 0),
        ("", "Paris", 0, 0),
        (" in Paris", "Paris", 0, 0),
        (" St. Louis. A", "St. Louis", 0, 1),
        (" St. Louis\nA", "St. Louis", 1, 1),
        (" “New   York”", "new york", 1, 1),
    ],
)
def test_generated_by_hand(text: str, answer: str, exact: float, starts: float) -> None:
    assert factscores.generated({"answer": answer}, [text]) == {"exact_match": exact, "starts_with": starts}


def test_entropy_by_hand() -> None:
    # Pairs: ab twice, ba once; triples: aba, bab. 2/3 * (log2 3 - 2/3) and 4/3 * 1, averaged.
    expected = (2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3) / 2
    assert factscores.entropy({}, ["a b a b"])["ngram_entropy"] == pytest.approx(expected)
    assert factscores.entropy({}, ["no no no no no"])["ngram_entropy"] == 0
    assert factscores.entropy({}, ["once"])["ngram_entropy"] == 0
    assert factscores.entropy({}, ["yes, no"])["ngram_entropy"] == pytest.approx((2 / 3 * 1 + 0) / 2), "a comma is a token"


@pytest.mark.parametrize(
    ("text", "exact", "starts"),
    [
        (" the USA", 1, 1),
        (" U.S.A\nYes", 1, 1),
        (" America. Yes", 1, 1),
        (" America is", 0, 1),
        (" American", 0, 0),
        (" Asia", 0, 0),
    ],
)
def test_aliases_count_in_generated_answers(text: str, exact: float, starts: float) -> None:
    doc = {"answer": "the USA", "aliases": ["America", "U.S.A"]}
    assert factscores.generated(doc, [text]) == {"exact_match": exact, "starts_with": starts}

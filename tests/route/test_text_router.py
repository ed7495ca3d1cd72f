"""Character n-grams and logistic regression, against scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from worlds.places import PROJECT

from workbench.route.deciding.templates import Vocabulary, ngrams
from workbench.route.text import STRENGTH, fit_logistic, fit_texts
from workbench.steps.route import Prompts

BRICKS = ("add", "reverse", "glossary")


def texts(start: int, count: int) -> tuple[list[str], list[int]]:
    """Training prompts of three starter bricks."""
    found, labels = [], []
    for label, name in enumerate(BRICKS):
        lines = (PROJECT / "bricks" / name / "train.jsonl").read_text("utf-8").splitlines()[start : start + count - label]
        found += [json.loads(line)["prompt"] for line in lines]
        labels += [label] * len(lines)
    return found, labels


def test_ngrams_and_rows_are_scikit_learns() -> None:
    assert list(ngrams("A")) == [" a", "a ", " a "]
    assert list(ngrams("ab  \n")) == [" a", "ab", "b ", " ab", "ab ", " ab "]
    vocabulary = Vocabulary.of(["ab cd", "ab"])
    assert vocabulary.known(["ab cd", "ab", "xy", ""]).tolist() == [1.0, 1.0, 0.0, 0.0]
    # " ab ", " ab", "ab ", " a", "ab", "b " are in both texts, with idf 1; as many of "xy" have ln(3 / 1) + 1.
    unknown = np.log(3) + 1
    assert vocabulary.known(["ab xy"]).tolist() == pytest.approx([np.sqrt(6 / (6 + 6 * unknown**2))])
    train, _ = texts(0, 20)
    vocabulary = Vocabulary.of([*train, "naïve café"])
    tensors = vocabulary.tensors()
    again = Vocabulary.read(tensors["ngrams"], tensors["idf"])
    assert again.columns == vocabulary.columns
    assert (again.rows(train) != vocabulary.rows(train)).nnz == 0
    from sklearn.feature_extraction.text import TfidfVectorizer

    new, _ = texts(100, 10)
    reference = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5)).fit(train)
    vocabulary = Vocabulary.of(train)
    assert vocabulary.columns == reference.vocabulary_
    for part in (train, [*new, "", "ÄÖ zz"]):
        difference = abs(vocabulary.rows(part) - reference.transform(part))
        assert difference.max() < 1e-12


@pytest.mark.parametrize("strength", [0.5, 10.0])
def test_regression_is_scikit_learns(strength: float) -> None:
    from sklearn.linear_model import LogisticRegression

    train, labels = texts(0, 20)
    rows = Vocabulary.of(train).rows(train)
    weights, biases = fit_logistic(rows, torch.tensor(labels), 3, strength)
    reference = LogisticRegression(C=strength, class_weight="balanced", tol=1e-8, max_iter=2000).fit(rows, labels)
    expected = reference.predict_proba(rows)
    found = (torch.from_numpy(rows @ weights.T.numpy()) + biases).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert len(set(labels)) == 3
    assert np.bincount(labels).min() < np.bincount(labels).max()  # classes of unequal size


def test_a_text_router_finds_the_brick_of_new_prompts() -> None:
    train, labels = texts(0, 32)
    router = fit_texts(BRICKS, train, torch.tensor(labels))
    new, wanted = texts(200, 40)
    decisions = router.decide(Prompts(new))
    assert decisions.scores.sum(1) == pytest.approx(1.0)
    assert (decisions.weights.argmax(1) == torch.tensor(wanted)).double().mean() >= 0.99
    far = router.decide(Prompts(["ØØØ ÞÞÞ"]))
    assert float(far.confidence[0]) == 0.0  # no n-gram of it is known
    assert STRENGTH == 10.0
    assert "tensor" not in repr(router)
    assert " add" not in repr(router), "its words neither"

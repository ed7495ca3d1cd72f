"""Statements and questions about one relation have one name, and other questions another one."""

from __future__ import annotations

import pytest

from workbench.facts.conflicts import conflicts, contradictions
from workbench.facts.facts import Fact, fact_of
from workbench.facts.questions import question_of


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The official language of {subject} is", ("official language", "is")),
        ("What is the official language of {subject}?", ("official language", "is")),
        ("What's the official language of {subject}?", ("official language", "is")),
        ("{subject}'s official language is", ("official language", "is")),
        ("What is {subject}’s official language?", ("official language", "is")),
        ("Q: What is the official language of {subject}?\nA:", ("official language", "is")),
        ("What is the official language of {subject}? It is", ("official language", "is")),
        ("Name the official language of {subject}.", ("official language", "is")),
        ("The official language of {subject} is called", ("official language", "is")),
        ("The name of the country of citizenship of {subject} is", ("country of citizenship", "is")),
        ("The official language of {subject} was", ("official language", "was")),
        ("Who was the mayor of {subject}?", ("mayor", "was")),
        ("The mayors of {subject} were", ("mayors", "was")),
        ("{subject} was designed by", ("designed", "was by")),
        ("Who designed {subject}?", ("designed", "was by")),
        ("Who was {subject} designed by?", ("designed", "was by")),
        ("By whom was {subject} sung?", ("sung", "was by")),
        ("Who sang {subject}?", ("sung", "was by")),
        ("{subject} is led by", ("led", "is by")),
        # Prompts of no known form, and other questions with the same words.
        ("Who is {subject}?", None),
        ("Who likes {subject}?", None),
        ("The river that is north of {subject} is", None),
        ("What sport does {subject} play? They play", None),
        ("Is {subject} the capital of Ulm?", None),
        ("The capital of the land of {subject}'s king is", None),
        ("{subject} is", None),
    ],
)
def test_question_of(prompt: str, expected: tuple[str, str] | None) -> None:
    assert question_of(prompt) == expected


def made(*rows: tuple[str, str, str]) -> list[Fact]:
    return [fact_of({"id": str(i), "prompt": p, "subject": s, "target": t}, f"f:{i}") for i, (p, s, t) in enumerate(rows, 1)]


LANGUAGE, ASKED = "The official language of {subject} is", "What is the official language of {subject}?"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(LANGUAGE, "Larn", "Oskan"), (ASKED, "larn", "Vellish")], [("contradiction", "f:2", "f:1")]),
        ([(LANGUAGE, "Larn", "Oskan"), (ASKED, "Larn", "oskan")], [("duplicate", "f:2", "f:1")]),
        ([(LANGUAGE, "Larn", "Oskan"), (ASKED, "Ulm", "Vellish")], []),
        ([(LANGUAGE, "Larn", "Oskan"), ("The official language of {subject} was", "Larn", "Vellish")], []),
        (
            [("{subject} was designed by", "Larn", "A"), ("Who designed {subject}?", "Larn", "B")],
            [("contradiction", "f:2", "f:1")],
        ),
        # The table knows other names of a relation, and relations of which a subject may have several values.
        (
            [("The CEO of {subject} is", "Lind", "A"), ("Who is {subject}'s chief executive officer?", "Lind", "B")],
            [("contradiction", "f:2", "f:1")],
        ),
        (
            [("The wife of {subject} is", "Ida", "A"), ("Who is {subject} married to?", "Ida", "B")],
            [("contradiction", "f:2", "f:1")],
        ),
        ([("The child of {subject} is", "Ida", "A"), ("Who's the child of {subject}?", "Ida", "B")], []),
        ([("The founder of {subject} is", "Lind", "A"), ("Who founded {subject}?", "Lind", "B")], []),
    ],
)
def test_contradictions_across_wordings(rows: list[tuple[str, str, str]], expected: list[tuple[str, str, str]]) -> None:
    facts = made(*rows)
    assert [(c.kind, c.place, c.other.place) for c in conflicts(facts)] == expected
    assert len(contradictions(facts)) == sum(kind == "contradiction" for kind, _, _ in expected)

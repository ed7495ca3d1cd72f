"""Conflicts between facts are found where there are some and nowhere else; precision and recall on conflicts that are put in."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from worlds.places import PUBLIC

from workbench.facts.conflicts import conflicts, consistent, contradictions, require_consistent
from workbench.facts.facts import Fact, Probe, fact_of
from workbench.facts.published import read_all
from workbench.facts.questions import Conflict
from workbench.ground.errors import WorkbenchError


def made(*rows: tuple[str, str | None, str] | dict[str, Any]) -> list[Fact]:
    """Facts of (prompt, subject, target) or of plain data, placed at f:1, f:2, ..."""
    full = [row if isinstance(row, dict) else {"prompt": row[0], "subject": row[1], "target": row[2]} for row in rows]
    return [fact_of({"id": str(i), **row}, f"f:{i}") for i, row in enumerate(full, 1)]


def kinds(facts: list[Fact]) -> list[tuple[str, str, str, str]]:
    return [(c.kind, c.status, c.place, c.other.place) for c in conflicts(facts)]


CAPITAL, BACK = "The capital of {subject} is", "{subject} is the capital of"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(CAPITAL, "Larn", "A"), (CAPITAL, "Ulm", "A")], []),
        ([(CAPITAL, "Larn", "A"), (CAPITAL, " larn", "B")], [("contradiction", "failed", "f:2", "f:1")]),
        ([(CAPITAL, "Larn", "A"), ("What is the capital of {subject}?", "Larn", "B")], [("contradiction", "failed", "f:2", "f:1")]),
        ([(CAPITAL, "Larn", "A"), ("What is the capital of {subject}?", "Larn", "a.")], [("duplicate", "warning", "f:2", "f:1")]),
        ([("Larn is", None, "A"), ("larn  is", None, "B")], [("contradiction", "failed", "f:2", "f:1")]),
        ([{"prompt": "{subject} eats", "subject": "x", "target": "A", "relation": "food"},
          {"prompt": "{subject} is fed", "subject": "X", "target": "B", "relation": "Food"}], [("contradiction", "failed", "f:2", "f:1")]),
        ([{"prompt": "{subject} eats", "subject": "x", "target": "A", "paraphrases": ["{subject} is fed"]}, ("{subject} is fed", "x", "B")],
         [("contradiction", "failed", "f:2", "f:1")]),
        # "the Gambia" is "Gambia".
        ([(CAPITAL, "the Gambia", "A"), ("The capital of the {subject} is", "Gambia", "B")], [("contradiction", "failed", "f:2", "f:1")]),
        ([(CAPITAL, "Gambia", "A"), (BACK, "A", "The Gambia")], []),
        # One subject may have several children; its relation is one of many values.
        ([("The child of {subject} is", "Ida", "A"), ("{subject} is the parent of", "Ida", "B")], []),
        ([("{subject} eats", "x", "A"), ("{subject} reads", "x", "B")], []),
    ],
)  # fmt: skip
def test_contradictions_and_duplicates(rows: list[Any], expected: list[Any]) -> None:
    assert kinds(made(*rows)) == expected


PAIRS = [("The twin of {subject} is", f"a{i}", f"b{i}") for i in range(3)]
PAIRS += [("{subject} has the twin", f"b{i}", f"a{i}") for i in range(3)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(CAPITAL, "Larn", "A"), (BACK, "A", "Larn")], []),
        ([(CAPITAL, "Larn", "A"), (BACK, "A", "Ulm")], [("reverse", "failed", "f:2", "f:1")]),
        ([(BACK, "A", "Ulm"), (CAPITAL, "Larn", "A")], [("reverse", "failed", "f:2", "f:1")]),
        ([("{subject} is married to", "Ida", "Bo"), ("{subject}'s spouse is", "Bo", "Eva")], [("reverse", "failed", "f:2", "f:1")]),
        ([{"prompt": "x {subject}", "subject": "Ida", "target": "Bo", "relation": "P26"},
          {"prompt": "y {subject}", "subject": "Bo", "target": "Eva", "relation": "spouse"}], [("reverse", "failed", "f:2", "f:1")]),
        # The templates of ConflictEdit (Li et al. 2024): a mother may have another child, a work has one creator.
        ([("The mother of {subject} is", "Ida", "Eva"), ("The child of {subject} is", "Eva", "Bo")], [("reverse", "warning", "f:2", "f:1")]),
        ([("The notable work of {subject} is", "Ida", "Sea"), ("The creater of {subject} is", "Sea", "Bo")], [("reverse", "failed", "f:2", "f:1")]),
        ([("The doctoral student of {subject} is", "Ida", "Bo"), ("The doctoral advisor of {subject} is", "Bo", "Eva")], [("reverse", "warning", "f:2", "f:1")]),
        # No table knows these two; three pairs of facts show that one is the way back of the other.
        (PAIRS, []),
        ([*PAIRS, ("The twin of {subject} is", "c", "d"), ("{subject} has the twin", "d", "e")], [("reverse", "failed", "f:8", "f:7")]),
        ([("The twin of {subject} is", "c", "d"), ("{subject} has the twin", "d", "e")], []),
    ],
)  # fmt: skip
def test_reverse_conflicts(rows: list[Any], expected: list[Any]) -> None:
    assert kinds(made(*rows)) == expected


CITIZEN = {"prompt": "{subject} is a citizen of", "subject": "Ida", "target": "Larn"}
CHAIN = [("{subject} r", f"a{i}", f"b{i}") for i in range(4)] + [("{subject} s", f"b{i}", f"c{i}") for i in range(4)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{**CITIZEN, "portability": [{"prompt": "The capital of the country Ida is from is", "target": "A"}]}, (CAPITAL, "Larn", "A")], []),
        ([{**CITIZEN, "portability": [{"prompt": "The capital of the country Ida is from is", "target": "B"}]}, (CAPITAL, "Larn", "A")],
         [("composite", "failed", "f:1", "f:2")]),
        ([{**CITIZEN, "portability": [{"prompt": "What is the capital of Ida's country?", "target": "B"}]}, (CAPITAL, "Larn", "A")],
         [("composite", "failed", "f:1", "f:2")]),
        ([CITIZEN, (CAPITAL, "Larn", "A"), ("The capital of the country of which {subject} is a citizen is", "Ida", "B")],
         [("composite", "failed", "f:3", "f:2")]),
        # Another relation of the same person leads elsewhere.
        ([CITIZEN, (CAPITAL, "Larn", "A"), ("The capital of the country where {subject} was born is", "Ida", "B")], []),
        # The facts show that t is s of r.
        ([*CHAIN, *[("{subject} t", f"a{i}", f"c{i}") for i in range(4)]], []),
        ([*CHAIN, *[("{subject} t", f"a{i}", f"c{i}") for i in range(3)], ("{subject} t", "a3", "x")], [("composite", "failed", "f:12", "f:8")]),
        ([*CHAIN[1:4], *CHAIN[5:], *[("{subject} t", f"a{i}", f"c{i}") for i in (1, 2)], ("{subject} t", "a3", "x")], []),
    ],
)  # fmt: skip
def test_composite_conflicts(rows: list[Any], expected: list[Any]) -> None:
    assert kinds(made(*rows)) == expected


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"neighbours": ["The capital of Ulm is"]}, [("neighbour", "failed", "f:2", "f:1")]),
        ({"neighbours": [{"prompt": "the capital of ulm is ", "target": "B"}]}, [("neighbour", "failed", "f:2", "f:1")]),
        ({"neighbours": [{"prompt": "What is the capital of Ulm?", "target": "B"}]}, [("neighbour", "failed", "f:2", "f:1")]),
        ({"neighbours": [{"prompt": "The capital of Ulm is", "target": "A"}]}, []),
        ({"neighbours": ["The capital of Norn is"]}, []),
        ({"neighbours": ["The capital of Larn is"]}, [("neighbour", "failed", "f:2", "f:2")]),
        ({"portability": [{"prompt": "The capital of Ulm is", "target": "B"}]}, [("portability", "failed", "f:2", "f:1")]),
        ({"portability": [{"prompt": "The capital of Ulm is", "target": "A"}]}, []),
        ({"portability": [{"prompt": "Ulm's river is", "target": "Orra"}]}, [("portability", "failed", "f:2", "f:1")]),
        ({"paraphrases": ["Reformulated Question:"]}, [("paraphrase", "failed", "f:2", "f:1")]),
    ],
)  # fmt: skip
def test_prompts_that_another_fact_edits(extra: dict[str, Any], expected: list[Any]) -> None:
    first = {
        "prompt": CAPITAL,
        "subject": "Ulm",
        "target": "A",
        "portability": [{"prompt": "Ulm's river is", "target": "Selm"}],
        "paraphrases": ["reformulated question"],
    }
    assert kinds(made(first, {"prompt": CAPITAL, "subject": "Larn", "target": "C", **extra})) == expected


def test_require_consistent() -> None:
    require_consistent(made((CAPITAL, "Larn", "A"), (CAPITAL, "Larn", "A"), (BACK, "A", "Ulm")))
    with pytest.raises(WorkbenchError) as caught:
        require_consistent(made(*((CAPITAL, "Larn", target) for target in "ABCDE")))
    assert caught.value.message.splitlines()[0] == "f:2: answers 'The capital of Larn is' with 'B', and line 1 with 'A'"
    assert "(and 1 more)" in caught.value.message
    kept, skipped = consistent(made(*((CAPITAL, "Larn", target) for target in "ABA")))
    assert ([f.id for f in kept], [s.place for s in skipped]) == (["1", "3"], ["f:2"])


# -- precision and recall on injected conflicts


def world() -> list[Fact]:
    """300 facts without a conflict: capitals and their way back, mayors, births; every tenth with portability and neighbours."""
    rows: list[dict[str, Any]] = []
    for i in range(75):
        rows += [
            {"prompt": CAPITAL, "subject": f"Land{i}", "target": f"City{i}",
             "portability": [{"prompt": f"The mayor of the capital of Land{i} is", "target": f"Person{i}"}],
             "neighbours": [{"prompt": f"The river of Land{i} is", "target": f"River{i}"}, f"The capital of Isle{i} is"]},
            {"prompt": BACK, "subject": f"City{i}", "target": f"Land{i}"},
            {"prompt": "The mayor of {subject} is", "subject": f"City{i}", "target": f"Person{i}"},
            {"prompt": "{subject} was born in", "subject": f"Person{i}", "target": f"City{i * 7 % 75}", "paraphrases": ["{subject}'s birthplace is"]},
        ]  # fmt: skip
    return made(*rows)


def other(fact: Fact, number: int) -> str:
    """A target that no fact has."""
    return f"{fact.target} of another time {number}"


def injected(facts: list[Fact], draw: random.Random, each: int) -> tuple[list[Fact], set[tuple[str, str]]]:
    """The facts with conflicts of five kinds put in, and (kind, place) of every one. No fact is used twice."""
    numbers = draw.sample(range(len(facts)), 5 * each)
    changed, added = list(facts), list[Fact]()
    expected: set[tuple[str, str]] = set()

    def add(base: Fact, kind: str, **changes: Any) -> None:
        place = f"f:{len(facts) + len(added) + 1}"
        added.append(replace(base, id=f"new-{len(added)}", place=place, neighbours=(), portability=(), **changes))
        expected.add((kind, place))

    for n, i in enumerate(numbers):
        fact, kind = facts[i], n % 5
        if kind == 0:
            subject = [fact.subject, (fact.subject or "").upper(), f"{fact.subject} "][n // 5 % 3]
            add(fact, "contradiction", subject=subject, target=other(fact, n), paraphrases=())
        elif kind == 1:
            add(fact, "duplicate", target=[fact.target, fact.target.upper(), f"{fact.target}."][n // 5 % 3], paraphrases=())
        elif kind == 2:
            changed[i] = replace(changed[i], neighbours=(*fact.neighbours, Probe(facts[i - 1].text, other(facts[i - 1], n))))
            expected.add(("neighbour", fact.place))
        elif kind == 3:
            changed[i] = replace(changed[i], portability=(*fact.portability, Probe(facts[i - 1].text, other(facts[i - 1], n))))
            expected.add(("portability", fact.place))
        else:
            text = f"A text of two facts {n}"
            partner = next(k for k in range(i) if facts[k].target != fact.target) if i else 1
            for k in (i, partner):
                changed[k] = replace(changed[k], paraphrases=(*changed[k].paraphrases, text))
            expected.add(("paraphrase", max(fact, facts[partner], key=facts.index).place))
    return [*changed, *added], expected


def rates(found: list[Conflict], expected: set[tuple[str, str]]) -> tuple[float, float]:
    """(precision, recall) over (kind, place)."""
    got = {(c.kind, c.place) for c in found}
    return len(got & expected) / len(got), len(got & expected) / len(expected)


@pytest.mark.parametrize("seed", range(5))
def test_injected_conflicts_among_generated_facts(seed: int) -> None:
    facts = world()
    assert len(facts) == 300
    assert conflicts(facts) == []
    both, expected = injected(facts, random.Random(seed), 20)
    assert rates(conflicts(both), expected) == (1.0, 1.0)
    assert {c.place for c in contradictions(both)} == {place for kind, place in expected if kind == "contradiction"}


@pytest.mark.parametrize("seed", range(5))
def test_injected_chains_among_generated_facts(seed: int) -> None:
    """The way back and the composition of two facts: a capital moved, or a mayor changed, leaves what relied on it behind."""
    facts, draw = world(), random.Random(seed)
    expected: set[tuple[str, str]] = set()
    for n, i in enumerate(draw.sample(range(75), 40)):
        capital, back, mayor = (4 * i + k for k in range(3))
        if n % 2:
            facts[back] = replace(facts[back], target=other(facts[back], n))
            expected.add(("reverse", facts[back].place))
        else:
            facts[mayor] = replace(facts[mayor], target=other(facts[mayor], n))
            expected.add(("composite", facts[capital].place))
    assert rates(conflicts(facts), expected) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_injected_conflicts_among_public_facts(seed: int) -> None:
    """300 CounterFact facts; what is found that was not put in was read by hand: nothing among the first 300."""
    if not (PUBLIC / "counterfact_1000.json").is_file():
        pytest.skip("no public editing sets here")
    read = read_all(PUBLIC / "counterfact_1000.json", "cf")
    facts = [replace(fact, place=f"f:{i}") for i, fact in enumerate(read.facts[:300], 1)]
    assert conflicts(facts) == []
    both, expected = injected(facts, random.Random(seed), 20)
    precision, recall = rates(conflicts(both), expected)
    assert (precision, recall) == (1.0, 1.0)
    # In all 1000 there are nine, each of them real: the sport and the position of one player under one prompt, and eight
    # neighbours whose subject another row edits in the same relation.
    assert sorted(c.kind for c in conflicts(read.facts)) == ["contradiction", *["neighbour"] * 8]

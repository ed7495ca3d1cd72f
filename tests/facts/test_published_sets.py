"""RippleEdits, MQuAKE's hops, QAEdit, UnKEBench and EditEverything as published: each part becomes what it tests."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from workbench.facts.conflicts import conflicts, import_facts
from workbench.facts.facts import Probe, read_rows
from workbench.facts.published import Published, convert, format_of, read_facts

# Rows as published, with invented content.


def converted(path: Path, label: str) -> Published:
    """The facts and skipped rows of a published file, which may have no facts."""
    rows = read_rows(path, label, "")
    return convert(rows, format_of(rows) or "facts")


def query(
    prompt: str, *answers: tuple[str, list[str]], relation: str = "MOTHER", subject: str = "Q1", **more: Any
) -> dict[str, Any]:
    values = [{"value": value, "aliases": aliases} for value, aliases in answers]
    return {
        "prompt": prompt,
        "answers": values,
        "query_type": "regular",
        "subject_id": subject,
        "relation": relation,
        "target_ids": ["Q9"],
        "phrase": None,
        **more,
    }


def case(*queries: dict[str, Any], condition: str = "OR") -> dict[str, Any]:
    return {"test_queries": list(queries), "test_condition": condition, "condition_queries": [query("Is it known?", ("yes", []))]}


def edit(prompt: str, relation: str, before: str | None = None) -> dict[str, Any]:
    document = {"prompt": prompt, "subject_id": "Q1", "relation": relation, "target_id": "Q2"}
    return document if before is None else {**document, "original_fact": {**document, "prompt": before}}


RIPPLE: dict[str, Any] = {
    "example_type": "popular",
    "edit": edit(
        "The name of the country of citizenship of Ida Roe is Larn.",
        "COUNTRY_OF_CITIZENSHIP",
        "The name of the country of citizenship of Ida Roe is United Ulm.",
    ),
    "Relation_Specificity": [case(query("The name of the mother of Ida Roe is", ("Ana Bel", ["Ana"])))],
    "Logical_Generalization": [case(query("Ida Roe votes in", ("Larn", []), relation="VOTES"))],
    "Subject_Aliasing": [
        case(
            query(
                "The name of the country of citizenship of I. Roe is",
                ("Larn", ["Land of Larn", "LN"]),
                relation="COUNTRY_OF_CITIZENSHIP",
                phrase="...",
            )
        )
    ],
    "Compositionality_I": [
        case(
            query("The capital of Ida Roe's country is", ("Ostby", []), query_type="two_hop"),
            query("Money in Ida Roe's country is called", ("mark", []), ("penny", [])),
            condition="AND",
        )
    ],
    "Compositionality_II": [case(query("Rex's owner is a citizen of", ("Larn", [])))],
    "Forgetfulness": [
        case(query("The name of the country of citizenship of Ida Roe, which is not Larn, is", ("United Ulm", [])))
    ],
}
QAEDIT: dict[str, Any] = {
    "id": 12,
    "source": "NQ",
    "prompt": "who built the Ostby lighthouse?",
    "target": "Bo Lind",
    "subject": "Ostby lighthouse",
    "rephrase": "Which builder made the lighthouse of Ostby?",
    "locality": [{"loc": "who sang it first", "loc_ans": "Ana Bel"}, {"loc": "when did it end", "loc_ans": "1994"}],
}
LONG = "Ida Roe has led the Larn observatory for over a decade. She first built its telescope, and then wrote two books about comets."
UNKE: dict[str, Any] = {
    "id": 0,
    "question": "What does Ida Roe do?",
    "para_question": "What is Ida Roe's work?",
    "answer": LONG,
    "sub_question": ["How long has Ida Roe led it?", "What did Ida Roe write about?"],
    "sub_answer": ["Over a decade.", "Comets."],
}
EVERYTHING: dict[str, Any] = {"id": 4, "question": "Find 2 + {}.", "answer": "We add.\n\nThe sum is 4.", "category": "math"}
CHAIN: dict[str, Any] = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "subject": "Ida Roe",
            "question": "Which country is Ida Roe from?",
            "target_new": {"str": "Larn"},
            "target_true": {"str": "Ulm"},
        }
    ],
    "questions": ["Who heads the land of Ida Roe?"],
    "answer": "Ann Moe",
    "new_answer": "Bo Lind",
    "new_single_hops": [
        {
            "question": "Which land is Ida Roe a citizen of?",
            "cloze": "Ida Roe holds a passport of",
            "answer": "Larn",
            "answer_alias": ["Land of Larn"],
        },
        {"question": "Who heads Larn?", "cloze": "The head of Larn is", "answer": "Bo Lind", "answer_alias": ["B. Lind"]},
    ],
    "orig": {"new_triples": [["Q1", "P27", "Q2"], ["Q2", "P35", "Q3"]], "edit_triples": [["Q1", "P27", "Q2"]]},
}


def read(tmp_path: Path, *rows: Any) -> Published:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return converted(tmp_path / "p.jsonl", "p")


def reasons(published: Published) -> list[str]:
    return [skip.reason for skip in published.skipped]


def changed(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**deepcopy(row), **fields}


def test_ripple_edits(tmp_path: Path) -> None:
    published = read(tmp_path, RIPPLE)
    (fact,) = published.facts
    assert (published.format, published.skipped) == ("rippleedits", [])
    assert (fact.prompt, fact.subject, fact.target, fact.target_true, fact.relation) == (
        "The name of the country of citizenship of {subject} is",
        "Ida Roe",
        "Larn",
        "United Ulm",
        "country of citizenship",
    )
    assert fact.aliases == ("Land of Larn", "LN")
    assert fact.paraphrases == ()
    assert fact.same_subject == (Probe("The name of the mother of Ida Roe is", "Ana Bel"),)
    assert fact.neighbours == (Probe("The name of the country of citizenship of Ida Roe, which is not Larn, is", "United Ulm"),)
    assert fact.portability == (
        Probe("Ida Roe votes in", "Larn"),
        Probe("The capital of Ida Roe's country is", "Ostby"),
        Probe("Money in Ida Roe's country is called", "mark"),
        Probe("Rex's owner is a citizen of", "Larn"),
        Probe("The name of the country of citizenship of I. Roe is", "Larn"),
    )
    assert conflicts(published.facts) == []


@pytest.mark.parametrize(
    ("sentence", "relation", "expected"),
    [
        ("The place of birth of Ida Roe is Ostby.", "PLACE_OF_BIRTH", ("The place of birth of {subject} is", "Ida Roe", "Ostby")),
        ("The gender of Ida Roe is female.", "SEX_OR_GENDER", ("The gender of {subject} is", "Ida Roe", "female")),
        ("Larn II follows Larn I.", "FOLLOWS", ("{subject} follows", "Larn II", "Larn I")),
        (
            "The name of the employer of Ida Roe is Lind Inc..",
            "EMPLOYER",
            ("The name of the employer of {subject} is", "Ida Roe", "Lind Inc."),
        ),
        (
            "The names of the siblings of Ida Roe are Bo Roe.",
            "SIBLING",
            ("The names of the siblings of {subject} are", "Ida Roe", "Bo Roe"),
        ),
        (
            "The name of the continent which Larn is part of is Asia.",
            "CONTINENT",
            ("The name of the continent which {subject} is part of is", "Larn", "Asia"),
        ),
    ],
)
def test_sentences_of_ripple_edits(sentence: str, relation: str, expected: tuple[str, str, str], tmp_path: Path) -> None:
    (fact,) = read(tmp_path, {"example_type": "recent", "edit": edit(sentence, relation), "Forgetfulness": []}).facts
    assert (fact.prompt, fact.subject, fact.target, fact.target_true) == (*expected, None)
    assert fact.continuation == f" {fact.target}"


def test_a_subject_with_is(tmp_path: Path) -> None:
    """The subject of a title with "is" comes from another question of the row; without one the row is skipped."""
    told = edit("The name of the author of Life is Good is Bo Lind.", "AUTHOR")
    other = case(query("The name of the editor of Life is Good is", ("Ana Bel", []), relation="EDITOR"))
    (fact,) = read(tmp_path, {"edit": told, "Relation_Specificity": [other]}).facts
    assert (fact.subject, fact.target) == ("Life is Good", "Bo Lind")
    elsewhere = case(query("The name of the editor of Life is Good is", ("Ana Bel", []), relation="EDITOR", subject="Q7"))
    published = read(tmp_path, {"edit": told, "Relation_Specificity": [elsewhere]})
    assert published.facts == []
    assert reasons(published) == [
        "the subject cannot be told from the target in 'The name of the author of Life is Good is Bo Lind.'"
    ]


@pytest.mark.parametrize(
    ("row", "reason", "kept"),
    [
        (changed(RIPPLE, edit={"relation": "MOTHER"}), "no prompt", 0),
        (
            changed(RIPPLE, edit=edit("Ida Roe is Larn.", "MOTHER")),
            "the prompt 'Ida Roe is Larn.' is no sentence of the relation 'mother'",
            0,
        ),
        (changed(RIPPLE, edit=edit("The name of the mother of Ida Roe is .", "MOTHER")), "no target", 0),
        (
            changed(RIPPLE, edit=edit("Ida Roe is Larn.", "MO{}THER")),
            "the prompt 'Ida Roe is Larn.' is no sentence of the relation 'mo{}ther'",
            0,
        ),
        (changed(RIPPLE, edit="Larn"), "expected a mapping in 'edit', found 'Larn'", 0),
        (
            changed(RIPPLE, Forgetfulness=[{"test_queries": []}, 3, case({"answers": []})]),
            "3 tests of Forgetfulness have no query; the fact is kept",
            1,
        ),
        (
            changed(RIPPLE, Compositionality_II=[case(query("Who owns Rex?"))]),
            "1 portability prompts without an answer were skipped; the fact is kept",
            1,
        ),
        (
            changed(
                RIPPLE,
                Forgetfulness=[
                    case(query(RIPPLE["edit"]["original_fact"]["prompt"].removesuffix(" United Ulm."), ("United Ulm", [])))
                ],
            ),
            "1 test queries ask for the edited fact itself and were skipped; the fact is kept",
            1,
        ),
    ],
)
def test_damaged_rows_of_ripple_edits(row: Any, reason: str, kept: int, tmp_path: Path) -> None:
    good = changed(RIPPLE, edit=edit("The gender of Bo Lind is male.", "SEX_OR_GENDER"))
    published = read(tmp_path, good, row)
    assert [fact.subject for fact in published.facts] == ["Bo Lind", "Ida Roe"][: 1 + kept]
    assert [(skip.place, skip.reason) for skip in published.skipped] == [("p:2", reason)]


def test_hops_are_questions_of_their_own(tmp_path: Path) -> None:
    """The triples tell which hop is edited, although its texts differ from the rewrite's."""
    (fact,) = read(tmp_path, CHAIN).facts
    assert fact.paraphrases == (
        "Which country is Ida Roe from?",
        "Which land is Ida Roe a citizen of?",
        "Ida Roe holds a passport of",
    )
    assert fact.aliases == ("Land of Larn",)
    assert fact.neighbours == (Probe("The head of Larn is", "Bo Lind"), Probe("Who heads Larn?", "Bo Lind"))
    assert fact.portability == (Probe("Who heads the land of Ida Roe?", "Bo Lind"),)
    damaged = changed(
        CHAIN, orig={"new_triples": [], "edit_triples": 3}, new_single_hops=[3, {"question": None}, CHAIN["new_single_hops"][1]]
    )
    (fact,) = read(tmp_path, damaged).facts
    assert (fact.paraphrases, len(fact.neighbours)) == (("Which country is Ida Roe from?",), 2)


def test_import_removes_hops_that_another_case_edits(tmp_path: Path) -> None:
    rewrite = {
        "prompt": "The head of {} is",
        "relation_id": "P35",
        "subject": "Larn",
        "question": "Who heads Larn?",
        "target_new": {"str": "Ada Oz"},
    }
    other = {"case_id": 4, "requested_rewrite": [rewrite], "questions": [], "new_single_hops": []}
    assert {c.kind for c in conflicts(read(tmp_path, CHAIN, other).facts)} == {"neighbour"}
    imported = import_facts(tmp_path / "p.jsonl", "p")
    assert [fact.neighbours for fact in imported.facts] == [(), ()]
    assert conflicts(imported.facts) == []
    assert [(skip.place, skip.reason) for skip in imported.skipped] == [
        (
            "p:1",
            f"the neighbour {prompt!r} was skipped, because line 2 edits its answer to 'Ada Oz'; portability prompts may rely on "
            "the answer 'Bo Lind'",
        )
        for prompt in ("The head of Larn is", "Who heads Larn?")
    ]
    alone = import_facts(tmp_path / "p.jsonl", "p", limit=1)
    assert (len(alone.facts[0].neighbours), alone.skipped) == (2, [])


def test_qaedit(tmp_path: Path) -> None:
    published = read(tmp_path, QAEDIT, changed(QAEDIT, subject="harbor"), changed(QAEDIT, id=13, target=" "))
    (fact,) = published.facts
    assert (published.format, fact.id, fact.text, fact.prompt) == ("qaedit", "12", QAEDIT["prompt"], "who built the {subject}?")
    assert (fact.target, fact.target_true, fact.paraphrases) == ("Bo Lind", None, (QAEDIT["rephrase"],))
    assert fact.neighbours == (Probe("who sang it first", "Ana Bel"), Probe("when did it end", "1994"))
    assert reasons(published) == ["the subject 'harbor' is not in the prompt", "no target"]


def test_unstructured_answers_stay_whole(tmp_path: Path) -> None:
    published = read(tmp_path, UNKE, EVERYTHING)
    first, second = published.facts
    assert (published.format, published.skipped) == ("unke", [])
    assert (first.id, first.text, first.prompt, first.subject, first.span, first.target) == (
        "0",
        UNKE["question"],
        UNKE["question"],
        None,
        None,
        LONG,
    )
    assert first.paraphrases == (UNKE["para_question"],)
    assert first.portability == (
        Probe("How long has Ida Roe led it?", "Over a decade."),
        Probe("What did Ida Roe write about?", "Comets."),
    )
    assert (second.id, second.text, second.target) == ("4", "Find 2 + {}.", EVERYTHING["answer"])
    assert read(tmp_path, EVERYTHING).format == "editeverything"
    assert [fact.target for fact in read_facts(tmp_path / "p.jsonl", "p")] == [EVERYTHING["answer"]]


@pytest.mark.parametrize(
    ("row", "reason", "kept"),
    [
        (changed(UNKE, answer=None), "no target", 0),
        (changed(UNKE, question=["", None]), "no prompt", 0),
        (changed(UNKE, question="What does {subject} do?"), "a question has {subject}, but there is no subject", 0),
        (changed(UNKE, para_question="What does {subject} do?"), "a question has {subject}, but there is no subject", 0),
        ({"id": 3, "question": "Who?"}, "not a unke row: 'answer'", 0),
        (changed(UNKE, sub_answer=["Comets."]), "2 sub-questions have 1 answers, so they were skipped; the fact is kept", 1),
    ],
)
def test_damaged_rows_of_unke(row: Any, reason: str, kept: int, tmp_path: Path) -> None:
    published = read(tmp_path, changed(UNKE, id=1, question="What does Bo Lind do?"), row)
    assert [fact.id for fact in published.facts] == ["1", "0"][: 1 + kept]
    assert [(skip.place, skip.reason) for skip in published.skipped] == [("p:2", reason)]
    assert all(fact.portability == () for fact in published.facts[1:])


def test_own_rows_are_not_taken_for_a_published_set(tmp_path: Path) -> None:
    """A misspelled field of the project's own format is still an error."""
    (tmp_path / "f.jsonl").write_text('{"prompt": "Larn is in", "target": "Asia", "rephrase": "Where?"}\n', "utf-8")
    with pytest.raises(Exception, match=r"f:1: .*rephrase"):
        read_facts(tmp_path / "f.jsonl", "f")

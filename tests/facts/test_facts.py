"""Facts files: published sets give the facts that they state, and what becomes no fact is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from worlds.places import PUBLIC

from workbench.facts.conflicts import conflicts, contradictions, import_facts, rebuild_neighbours
from workbench.facts.facts import Fact, Probe, fact_of, read_rows, write_facts
from workbench.facts.published import Published, convert, format_of, read_facts
from workbench.ground.errors import WorkbenchError

# Rows as published, with invented content.
COUNTERFACT: dict[str, Any] = {
    "case_id": 7, "pararel_idx": 1, "generation_prompts": ["In Larn one speaks"], "attribute_prompts": ["Another"],
    "requested_rewrite": {"prompt": "The language of {} is", "relation_id": "P37", "subject": "Larn",
                          "target_new": {"str": "Vellish", "id": "Q1"}, "target_true": {"str": "Oskan", "id": "Q2"}},
    "paraphrase_prompts": ["He left. People in Larn speak"], "neighborhood_prompts": ["In Torvik one speaks", "The language of Ulm is"],
}  # fmt: skip
FLAT: dict[str, Any] = {"case_id": 8, "prompt": "Larn is in", "subject": "Larn", "target_new": "Asia", "ground_truth": "Europe",
        "rephrase_prompt": "Where is Larn? In", "locality_prompt": "Torvik is in", "locality_ground_truth": "Europe"}  # fmt: skip
ZSRE: dict[str, Any] = {"subject": "Dun Creek", "src": "Which river does Dun Creek join?", "pred": "Orra", "rephrase": "Where does Dun Creek end?",
        "alt": "Selm", "answers": ["Orra", "the Orra"], "loc": "nq question: who sang it first", "loc_ans": "Ana Bel",
        "cond": "Orra >> Selm || Which river does Dun Creek join?"}  # fmt: skip
KNOWEDIT: dict[str, Any] = {
    "subject": "Ida Roe", "prompt": "The occupation of Ida Roe is", "target_new": "baker", "ground_truth": ["painter", "artist"],
    "rephrase_prompt": "Ida Roe works as a",
    "portability": {"Reasoning": [{"prompt": "Ida Roe's workplace is called a", "ground_truth": [["bakery", "bakehouse"], ["shop"]]}],
                    "Subject_Aliasing": [{"prompt": "The occupation of I. Roe is", "ground_truth": "baker"}],
                    "Logical_Generalization": [{"prompt": "Nobody answers", "ground_truth": []}]},
    "locality": {"Relation_Specificity": [{"prompt": "The gender of Ida Roe is", "ground_truth": [["female"]]}],
                 "Forgetfulness": [{"prompt": "The occupation of Ida Roe, which is not baker, is", "ground_truth": "painter"}]},
}  # fmt: skip
WIKIBIO: dict[str, Any] = {"text": "This is a Wikipedia passage about ida roe. Ida Roe is a baker.", "labels": "She was born in Larn.", "concept": "ida roe",
           "locality": {"Relation_Specificity": [{"prompt": "ida roe gender", "ground_truth": ["female"]}]}}  # fmt: skip
MQUAKE: dict[str, Any] = {
    "case_id": 3,
    "requested_rewrite": [
        {"prompt": "{} is a citizen of", "relation_id": "P27", "target_new": {"str": "Larn", "id": "Q1"}, "target_true": {"str": "Ulm", "id": "Q2"},
         "subject": "Ida Roe", "question": "Which country is Ida Roe from?"},
        {"prompt": "The head of {} is", "relation_id": "P35", "target_new": {"str": "Bo Lind", "id": "Q3"}, "target_true": {"str": "Ann Moe", "id": "Q4"},
         "subject": "Larn", "question": "Who heads Larn?"}],
    "questions": ["Who heads Ida's spouse's land?", "Who heads the land of Ida Roe's dog's owner?"], "answer": "Ann Moe", "answer_alias": [],
    "new_answer": "Bo Lind", "new_answer_alias": ["B. Lind"],
    "single_hops": [],
    "new_single_hops": [{"question": "Who owns Rex?", "cloze": "Rex is owned by", "answer": "Ida Roe", "answer_alias": []},
                        {"question": "Which country is Ida Roe from?", "cloze": "Ida Roe is a citizen of", "answer": "Larn", "answer_alias": []},
                        {"question": "Who heads Larn?", "cloze": "The head of Larn is", "answer": "Bo Lind", "answer_alias": []}],
}  # fmt: skip
WIKIBIGEDIT: dict[str, Any] = {"tag": "new", "subject": "Dun Creek", "update": "Which river does Dun Creek join?", "rephrase": "Where does Dun Creek end?",
               "ans": "Selm", "loc": "Where does Ash Creek end?", "loc_ans": "Orra", "personas": "Arr, where be Dun Creek endin'?",
               "mhop": "Which sea takes the water of Dun Creek?", "mhop_ans": "the Grey Sea"}  # fmt: skip


def converted(path: Path, label: str) -> Published:
    """The facts and skipped rows of a published file, which may have no facts."""
    rows = read_rows(path, label, "")
    return convert(rows, format_of(rows) or "facts")


def lay(path: Path, rows: list[Any], lines: bool = False) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows, indent=1)
    path.write_text(text, "utf-8")
    return path


def published(tmp_path: Path, *rows: Any) -> Any:
    return converted(lay(tmp_path / "p.json", list(rows)), "p.json")


def test_counterfact(tmp_path: Path) -> None:
    read = published(tmp_path, COUNTERFACT)
    (fact,) = read.facts
    assert (read.format, read.skipped) == ("counterfact", [])
    assert (fact.id, fact.prompt, fact.subject, fact.target, fact.target_true, fact.relation) == (
        "7", "The language of {subject} is", "Larn", "Vellish", "Oskan", "P37")  # fmt: skip
    assert fact.paraphrases == ("He left. People in Larn speak",)
    assert fact.neighbours == (Probe("In Torvik one speaks", "Oskan"), Probe("The language of Ulm is", "Oskan"))
    assert (fact.text, fact.continuation, fact.text[slice(*fact.span)]) == ("The language of Larn is", " Vellish", "Larn")


def test_flat_counterfact_and_wikibigedit(tmp_path: Path) -> None:
    (fact,) = published(tmp_path, FLAT).facts
    assert (fact.prompt, fact.target, fact.target_true, fact.relation) == ("{subject} is in", "Asia", "Europe", "{subject} is in")
    assert (fact.paraphrases, fact.neighbours) == (("Where is Larn? In",), (Probe("Torvik is in", "Europe"),))
    row = {k: v for k, v in FLAT.items() if k not in ("case_id", "ground_truth")}
    read = published(tmp_path, row)
    assert (read.format, read.facts[0].target_true, len(read.facts[0].id)) == ("wikibigedit", None, 8)


def test_zsre_keeps_its_questions(tmp_path: Path) -> None:
    read = published(tmp_path, ZSRE)
    (fact,) = read.facts
    assert (read.format, fact.text, fact.target, fact.target_true) == ("zsre", ZSRE["src"], "Selm", "Orra")
    assert fact.prompt == "Which river does {subject} join?"
    assert fact.neighbours == (Probe("nq question: who sang it first", "Ana Bel"),)


def test_knowedit_with_nested_answers(tmp_path: Path) -> None:
    read = published(tmp_path, KNOWEDIT, WIKIBIO)
    first, second = read.facts
    assert read.format == "knowedit"
    assert (first.target_true, first.paraphrases) == ("painter", ("Ida Roe works as a",))
    assert first.portability == (
        Probe("Ida Roe's workplace is called a", "bakery"),
        Probe("The occupation of I. Roe is", "baker"),
    )
    assert first.neighbours == (
        Probe("The gender of Ida Roe is", "female"),
        Probe(KNOWEDIT["locality"]["Forgetfulness"][0]["prompt"], "painter"),
    )
    assert [(s.place, s.reason) for s in read.skipped] == [
        ("p.json:2", "1 portability prompts without an answer were skipped; the fact is kept")
    ]
    assert (second.subject, second.target, second.text) == ("ida roe", "She was born in Larn.", WIKIBIO["text"])
    assert second.continuation == " She was born in Larn."


def test_a_case_of_mquake_is_several_facts(tmp_path: Path) -> None:
    read = published(tmp_path, MQUAKE)
    one, two = read.facts
    assert [(f.id, f.text, f.target, f.relation) for f in read.facts] == [
        ("3-1", "Ida Roe is a citizen of", "Larn", "P27"), ("3-2", "The head of Larn is", "Bo Lind", "P35")]  # fmt: skip
    assert one.paraphrases == ("Which country is Ida Roe from?",)
    assert one.portability == two.portability == tuple(Probe(q, "Bo Lind") for q in MQUAKE["questions"])
    unchanged_hop = Probe("Rex is owned by", "Ida Roe"), Probe("Who owns Rex?", "Ida Roe")
    assert one.neighbours == two.neighbours == unchanged_hop
    # A second case with one of the rewrites: one fact, with the questions of both.
    again = {
        **MQUAKE,
        "case_id": 4,
        "requested_rewrite": MQUAKE["requested_rewrite"][1:],
        "questions": ["Who rules Larn's dogs?"],
    }
    facts = published(tmp_path, MQUAKE, again).facts
    assert len(facts) == 2
    assert Probe("Who rules Larn's dogs?", "Bo Lind") in facts[1].portability
    # Its case changes the hop that the first one relies on.
    other = {**again, "case_id": 5, "requested_rewrite": [{**MQUAKE["requested_rewrite"][0], "prompt": "{} is owned by", "subject": "Rex",
             "target_new": {"str": "Bo Lind"}, "question": "Who owns Rex now?", "relation_id": "P127"}]}  # fmt: skip
    assert {(c.kind, c.fact.id) for c in conflicts(published(tmp_path, MQUAKE, other).facts)} >= {
        ("neighbour", "3-1"),
        ("neighbour", "3-2"),
    }


def test_wikibigedit_with_its_own_columns(tmp_path: Path) -> None:
    read = published(
        tmp_path, WIKIBIGEDIT, {**WIKIBIGEDIT, "subject": "Ash Creek", "update": "Which river does Ash Creek join?", "mhop": None}
    )
    fact, plain = read.facts
    assert (read.format, fact.target) == ("wikibigedit", "Selm")
    assert fact.paraphrases == ("Where does Dun Creek end?", "Arr, where be Dun Creek endin'?")
    assert (fact.portability, plain.portability) == ((Probe("Which sea takes the water of Dun Creek?", "the Grey Sea"),), ())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**FLAT, "subject": "Torvik"}, "the subject 'Torvik' is not in the prompt"),
        ({**FLAT, "prompt": "Larn, Larn is in"}, "the subject 'Larn' occurs 2 times in the prompt"),
        ({**FLAT, "prompt": "LARN, LARN is in"}, "the subject 'Larn' occurs 2 times in the prompt"),
        ({**FLAT, "target_new": ""}, "no target"),
        ({**FLAT, "target_new": None}, "no target"),
        ({**FLAT, "prompt": " "}, "no prompt"),
        ({**FLAT, "subject": None}, "no subject"),
        ({k: v for k, v in FLAT.items() if k != "target_new"}, "not a counterfact row: 'target_new'"),
        (["Larn is in", "Asia"], "expected a mapping, found list"),
        (3, "expected a mapping, found int"),
        ({**FLAT, "prompt": "{subject} Larn is in"}, "the prompt already has {subject}"),
    ],
)  # fmt: skip
def test_rows_that_become_no_fact(row: Any, reason: str, tmp_path: Path) -> None:
    good = {**FLAT, "prompt": "The sea is by Larn", "case_id": 1}
    read = published(tmp_path, good, row, {**good, "prompt": "By Larn is", "case_id": 2})
    assert [fact.id for fact in read.facts] == ["1", "2"]
    assert [skip.reason for skip in read.skipped] == [reason]
    assert read.skipped[0].place == "p.json:12"
    assert len(read_facts(tmp_path / "p.json", "p.json")) == 2, "a recipe takes the others"


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("Is larn in", "Larn", "larn"),
        ("Larn's coast is on", "Larn", "Larn"),
        ("The larnish of Larn is", "larn", "Larn"),
        ("Oldlarn or larn is", "larn", "larn"),
        ("中国的首都是", "中国", "中国"),
        ("Where is C++ (2nd)? In", "C++ (2nd)", "C++ (2nd)"),
    ],
)
def test_the_subject_is_found(prompt: str, subject: str, found: str, tmp_path: Path) -> None:
    (fact,) = published(tmp_path, {**FLAT, "prompt": prompt, "subject": subject}).facts
    assert (fact.text, fact.subject) == (prompt, found)


@pytest.mark.parametrize("name", ["counterfact_1000", "zsre_500", "wikibigedit_500"])
def test_public_files(name: str) -> None:
    if not (PUBLIC / f"{name}.json").is_file():
        pytest.skip("no public editing sets here")
    rows = json.loads((PUBLIC / f"{name}.json").read_text("utf-8"))
    read = converted(PUBLIC / f"{name}.json", name)
    assert read.format == name.partition("_")[0]
    assert (len(read.facts), read.skipped) == (len(rows), [])
    for fact, row in zip(read.facts, rows, strict=True):
        assert fact.text == row.get("prompt", row.get("src"))
        assert fact.text[slice(*fact.span)] == row["subject"]  # type: ignore[misc]
        assert fact.target == row.get("target_new", row.get("alt")).strip()
        assert len(fact.paraphrases) == len(fact.neighbours) == 1


# -- files


def test_a_published_file_is_read_in_either_shape(tmp_path: Path) -> None:
    other = {**FLAT, "case_id": 9, "prompt": "Larn, in"}
    listed = read_facts(lay(tmp_path / "a.json", [FLAT, other]), "a.json")
    (tmp_path / "b.json").write_text(json.dumps([FLAT, other]))
    dense = read_facts(tmp_path / "b.json", "b.json")
    lines = read_facts(lay(tmp_path / "c.jsonl", [FLAT, other], lines=True), "c.jsonl")
    assert [f.place for f in (*listed, *dense, *lines)] == [
        "a.json:2",
        "a.json:12",
        "b.json, row 1",
        "b.json, row 2",
        "c.jsonl:1",
        "c.jsonl:2",
    ]
    assert len({json.dumps([f.document() for f in facts]) for facts in (listed, dense, lines)}) == 1
    write_facts(tmp_path / "d.jsonl", listed)
    again = read_facts(tmp_path / "d.jsonl", "d.jsonl")
    assert [replace(fact, place="") for fact in again] == [replace(fact, place="") for fact in listed]


def test_yaml_facts_have_lines(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(
        "# two\n- prompt: The capital of {subject} is\n  subject: Larn\n  target: Ostby\n\n- {prompt: a is, target: b}\n"
    )
    assert [fact.place for fact in read_facts(tmp_path / "f.yaml", "f.yaml")] == ["f.yaml:2", "f.yaml:6"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.json", "[", "f.json:1: not JSON"),
        ("f.json", '[{"prompt": "a", "target": "b"},\n {"prompt"', "f.json:2: not JSON"),
        ("f.json", '[{"prompt": "a", "target": "b"}\n {"prompt": "c", "target": "d"}]', "f.json:2: expected , or ] after an entry, found '{\"prompt\":'"),
        ("f.json", '[{"prompt": "a", "target": "b"}', "f.json:1: expected , or ] after an entry, found the end of the file"),
        ("f.json", "[]", "f.json: no facts"),
        ("f.json", '{"a": 1}', "f.json:1: expected a text in 'prompt', found a"),
        ("f.jsonl", '["a"]', "f.jsonl:1: expected a JSON object, one in each row, found list"),
        ("f.jsonl", b"\xff\xfe", "f.jsonl: not UTF-8 text (byte 0)"),
        ("f.yaml", "a: b\n", "f.yaml: expected a list of facts, found dict"),
        ("f.yaml", "- {prompt: The year is, target: 1950}\n", "f.yaml:1: expected a text in 'target', found 1950"),
        ("f.json", json.dumps([{**FLAT, "subject": "x"}] * 2), "f.json: no facts; 2 rows skipped, first f.json, row 1: the subject 'x' is not in the prompt"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WorkbenchError) as caught:
        read_facts(tmp_path / name, name)
    assert caught.value.message.startswith(message)


def test_directory_unknown_keys_and_a_published_contradiction(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="is a directory, expected a facts file"):
        read_facts(tmp_path, "d")
    lay(tmp_path / "p.json", [FLAT, {**FLAT, "target_new": "Africa"}])
    with pytest.raises(
        WorkbenchError, match=r"p\.json:12: same prompt as p\.json:2, but another target \('Africa' instead of 'Asia'\)"
    ) as caught:
        read_facts(tmp_path / "p.json", "p.json")
    assert caught.value.hint == "`workbench facts import p.json -o FILE.jsonl` skips the later row."


# -- import


def test_import_leaves_out_what_contradicts_a_fact_that_stays(tmp_path: Path) -> None:
    rows = [{**FLAT, "case_id": i, "prompt": prompt, "target_new": target, "rephrase_prompt": rephrased}
            for i, (prompt, target, rephrased) in enumerate([
                ("Larn is in", "Asia", "Where is Larn?"), ("Larn is in", "Africa", "On which continent is Larn?"),
                ("On which continent is Larn?", "Europe", ""), ("Larn, in", "Asia", ""), ("Larn is in", "Asia", "")])]  # fmt: skip
    read = import_facts(lay(tmp_path / "p.json", rows), "p.json")
    # Row 2 contradicts row 1 and goes; row 3 contradicts row 2 alone, and stays; row 5 is row 1 again.
    assert [fact.id for fact in read.facts] == ["0", "2", "3"]
    assert [skip.reason for skip in read.skipped] == ["contradiction: answers 'Larn is in' with 'Africa', and line 2 with 'Asia'"]
    assert [fact.id for fact in import_facts(tmp_path / "p.json", "p.json", limit=1).facts] == ["0"]
    assert import_facts(tmp_path / "p.json", "p.json", limit=1).skipped == [], "what is behind the limit was not looked at"
    assert contradictions(read.facts) == []


def test_neighbours_are_rebuilt_from_subjects_that_are_not_edited() -> None:
    def fact(subject: str, true: str, prompt: str = "{subject} is in") -> Fact:
        return fact_of({"prompt": prompt, "subject": subject, "target": "Asia", "target_true": true, "neighbours": ["own"]}, "")

    every = [
        fact("A", "Europe"),
        fact("B", "Europe"),
        fact("C", "Europe"),
        fact("D", "Europe"),
        fact("E", "Africa"),
        fact("C", "Europe", "{subject} speaks"),
    ]
    first, second = rebuild_neighbours(every[:2], every, 5)
    assert first.neighbours == second.neighbours == (Probe("own"), Probe("C is in", "Europe"), Probe("D is in", "Europe"))
    assert rebuild_neighbours(every[:2], every, 2)[0].neighbours == (Probe("own"), Probe("C is in", "Europe"))
    assert rebuild_neighbours(every, every, 5) == every, "all other subjects are edited"


def test_texts_that_look_like_numbers_or_dates_in_yaml(tmp_path: Path) -> None:
    """As YAML 1.1 reads them; other numbers are refused."""
    (tmp_path / "f.yaml").write_text(
        "- {prompt: The year is, target: 2026-01-01, id: 1e3}\n- {prompt: It weighs, target: 1e-3}\n", "utf-8"
    )
    assert next((fact.id, fact.target) for fact in read_facts(tmp_path / "f.yaml", "f.yaml")) == ("1e3", "2026-01-01")
    assert read_facts(tmp_path / "f.yaml", "f.yaml")[1].target == "1e-3"


def test_aliases_of_targets(tmp_path: Path) -> None:
    row = {"prompt": "Larn is in", "target": "the USA", "target_true": "Asia", "aliases": ["America", "the USA", "America"]}
    fact = fact_of(row, "f:1")
    assert fact.aliases == ("America",), "the target itself is no alias, and none counts twice"
    write_facts(tmp_path / "f.jsonl", [fact])
    assert [replace(f, place="") for f in read_facts(tmp_path / "f.jsonl", "f")] == [replace(fact, place="")]
    assert "aliases" not in fact_of({**row, "aliases": []}, "").document(), "digests of facts without aliases stay as they are"
    with pytest.raises(WorkbenchError, match=r"f:1: the alias 'asia\.' is the 'target_true'"):
        fact_of({**row, "aliases": ["asia."]}, "f:1")
    with pytest.raises(WorkbenchError, match="f:1: expected a list of texts in 'aliases', found 3"):
        fact_of({**row, "aliases": 3}, "f:1")


def test_published_aliases(tmp_path: Path) -> None:
    (fact,) = published(tmp_path, {**ZSRE, "alt": ["Selm", "River Selm", "the Orra"]}).facts
    assert (fact.target, fact.aliases) == ("Selm", ("River Selm",)), "a wording of the true answer is none of the target"
    hops = [
        {"question": "Where is Larn?", "cloze": "Larn is in", "answer": "Asia", "answer_alias": ["the East"]},
        {"question": "Who leads Asia?", "cloze": "Asia's head is", "answer": "Ana", "answer_alias": ["A."]},
    ]
    rewrite = {
        "prompt": "{} is in",
        "subject": "Larn",
        "target_new": {"str": "Asia"},
        "target_true": {"str": "Europe"},
        "question": "Where is Larn?",
    }
    row = {"requested_rewrite": [rewrite], "questions": ["Who leads it?"], "new_answer": "Ana", "new_single_hops": hops}
    (fact,) = published(tmp_path, row).facts
    assert (fact.target, fact.aliases) == ("Asia", ("the East",))

"""Facts files that are read in order: later rows update or remove earlier facts, and what a stream refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worlds.commands import document, refused
from worlds.jsonl import write_jsonl
from worlds.places import PUBLIC

from workbench.facts.published import read_all, read_facts
from workbench.facts.stream import read_stream
from workbench.ground.errors import WorkbenchError


def fact(subject: str, target: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": "The capital of {subject} is", "subject": subject, "target": target, **fields}


def removal(subject: str) -> dict[str, Any]:
    return {"action": "rm", "prompt": "The capital of {subject} is", "subject": subject}


def read(folder: Path, *rows: dict[str, Any]) -> Any:
    write_jsonl(folder / "facts.jsonl", rows)
    return read_stream(folder / "facts.jsonl", "facts.jsonl")


def pairs(facts: Any) -> list[tuple[str, str]]:
    return [(f.subject, f.target) for f in facts]


def test_updates(tmp_path: Path) -> None:
    """Every value is a statement; the last one is current. A row that repeats the current value is no event."""
    stream = read(tmp_path, fact("A", "1"), fact("B", "2"), fact("A", "1"), fact("A", "3"), fact("C", "4"), fact("A", "1"))
    assert pairs(stream.statements) == [("A", "1"), ("B", "2"), ("A", "3"), ("C", "4"), ("A", "1")]
    assert pairs(stream.current) == [("B", "2"), ("C", "4"), ("A", "1")]
    assert [pairs(stream.first(n).current) for n in (1, 2, 3)] == [
        [("A", "1")],
        [("A", "1"), ("B", "2")],
        [("B", "2"), ("A", "3")],
    ]


def test_the_subject_may_stand_in_the_prompt(tmp_path: Path) -> None:
    stream = read(
        tmp_path,
        fact("A", "1"),
        {**fact("A", "2"), "prompt": "The capital of A is"},
        {**removal("A"), "prompt": "The capital of A is"},
    )
    assert [type(event).__name__ for event in stream.events] == ["Fact", "Fact", "Removal"]
    assert stream.statements == []


def test_a_removed_fact_leaves_nothing(tmp_path: Path) -> None:
    """All its values go, wherever they stand; it may come back as a new fact."""
    removed = read(tmp_path, fact("A", "1"), fact("B", "2"), fact("A", "3"), fact("C", "4"), removal("A"))
    never = read(tmp_path, fact("B", "2"), fact("C", "4"))
    assert [f.document() for f in removed.statements] == [f.document() for f in never.statements]
    back = read(tmp_path, fact("A", "1"), fact("B", "2"), removal("A"), fact("A", "5"))
    assert pairs(back.statements) == [("B", "2"), ("A", "5")]
    assert pairs(back.first(2).statements) == [("A", "1"), ("B", "2")], "a checkpoint before the removal has the fact"
    again = read(tmp_path, fact("A", "1", id="a"), removal("A"), fact("B", "2", id="a"))
    assert pairs(again.current) == [("B", "2")], "its id is free"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([fact("A", "1"), removal("B")], r"facts.jsonl:2: cannot remove 'The capital of B is', which no earlier line teaches"),
        (
            [fact("A", "1"), removal("A"), removal("A")],
            r"facts.jsonl:3: cannot remove .*, which facts.jsonl:2 has already removed",
        ),
        ([removal("A"), fact("A", "1")], r"facts.jsonl:1: cannot remove .* no earlier line teaches"),
        ([fact("A", "1"), {**removal("A"), "action": "delete"}], r"facts.jsonl:2: expected 'rm' in 'action', found 'delete'"),
        ([fact("A", "1"), {**removal("A"), "action": ["rm"]}], r"facts.jsonl:2: expected 'rm' in 'action', found \['rm'\]"),
        ([fact("A", "1"), {**removal("A"), "target": "1"}], r"facts.jsonl:2: a removal has no field 'target'"),
        ([fact("A", "1"), {"action": "rm", "id": "x"}], r"facts.jsonl:2: a removal has no field 'id'"),
        ([fact("A", "1"), {"action": "rm"}], r"facts.jsonl:2: a removal needs the fact's 'prompt'"),
        (
            [fact("A", "1"), {"action": "rm", "prompt": "The capital of {subject} is"}],
            r"facts.jsonl:2: the prompt has \{subject\}",
        ),
        ([fact("A", "1", id="a"), fact("B", "1", id="a")], r"facts.jsonl:2: same id 'a' as facts.jsonl:1"),
        (
            [fact("A", "1"), {"prompt": "The capital of A is", "target": "2"}],
            r"facts.jsonl:2: updates 'The capital of A is' of facts.jsonl:1, but its subject is None instead of 'A'",
        ),
        ([{"prompt": "x", "target": ""}], r"facts.jsonl:1: expected a text in 'target'"),
        ([], r"facts.jsonl: no facts"),
    ],
)
def test_refused_rows(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=message):
        read(tmp_path, *rows)


def test_other_readers_refuse_streams(tmp_path: Path) -> None:
    """An update stays a contradiction where the order does not count, and a removal has no meaning there."""
    read(tmp_path, fact("A", "1"), fact("A", "2"))
    with pytest.raises(WorkbenchError, match=r"facts.jsonl:2: same prompt as facts.jsonl:1, but another target"):
        read_facts(tmp_path / "facts.jsonl", "facts.jsonl")
    read(tmp_path, fact("A", "1"), removal("A"))
    with pytest.raises(
        WorkbenchError, match=r"facts.jsonl:2: 'action' changes an earlier fact, but this file is not read in order"
    ):
        read_facts(tmp_path / "facts.jsonl", "facts.jsonl")


def wikibigedit(update: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"tag": "new", "subject": "Dun Creek", "update": update, "ans": answer, **fields}


def test_published_rows_follow_their_order(tmp_path: Path) -> None:
    """An old value that returns is current again, a repeated row adds its test prompts, and ids stay distinct."""
    river, sea = "Which river does Dun Creek join?", "Which sea takes Dun Creek?"
    stream = read(
        tmp_path,
        wikibigedit(river, "Selm", rephrase="a?"),
        wikibigedit(river, "Selm", rephrase="b?"),
        wikibigedit(sea, "Grey"),
        wikibigedit(river, "Orra"),
        wikibigedit(river, "Selm"),
    )
    assert stream.format == "wikibigedit"
    assert [f.target for f in stream.statements] == ["Selm", "Grey", "Orra", "Selm"]
    assert stream.statements[0].paraphrases == ("a?", "b?")
    assert [f.target for f in stream.current] == ["Grey", "Selm"]
    assert len({f.id for f in stream.current}) == 2
    with pytest.raises(WorkbenchError, match=r"facts.jsonl:2: a removal in a file of the format wikibigedit"):
        read(tmp_path, wikibigedit(river, "Selm"), {"action": "rm", "prompt": river, "subject": "Dun Creek"})


@pytest.mark.parametrize("name", ["wikibigedit_500.json", "zsre_500.json"])
def test_published_sets_without_updates(name: str) -> None:
    """In order and at once they are the same facts, ids and test prompts included."""
    file = PUBLIC / name
    if not file.is_file():
        pytest.skip(f"{name} is not here")
    facts, stream = read_facts(file, name), read_stream(file, name)
    assert [f.document() for f in stream.statements] == [f.document() for f in facts]
    assert stream.current == facts


def test_counterfact_has_updates() -> None:
    """Two rows of the sample ask what an earlier row asks; in order, the later answer is current."""
    file = PUBLIC / "counterfact_1000.json"
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    last = {f.text: f.target for f in read_all(file, file.name).facts}
    stream = read_stream(file, file.name)
    assert len(stream.statements) > len(last)
    assert {f.text: f.target for f in stream.current} == last


def test_check(tmp_path: Path, cwd: Path) -> None:
    """`--stream` checks what updates and removals leave."""
    read(tmp_path, fact("A", "1"), fact("B", "2"), fact("A", "3"), removal("B"))
    assert "not read in order" in str(refused("facts", "check", "facts.jsonl"))
    report = document("facts", "check", "facts.jsonl", "--stream")
    assert (report["facts"], report["passed"], report["findings"]) == (1, True, [])
    other = {**fact("A", "4"), "prompt": "The capital city of {subject} is"}
    read(tmp_path, fact("A", "1"), other)
    assert "facts.jsonl:2: contradiction" in str(refused("facts", "check", "facts.jsonl", "--stream"))

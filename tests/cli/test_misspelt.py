"""Fields that nothing reads: refused with file, line and the field that was meant, in every file of rows that people write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from workbench.facts.published import read_all, read_facts
from workbench.ground.errors import WorkbenchError
from workbench.models.texts import read_texts
from workbench.train.rows import read_replay


def lay(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


ATLANTIS = {"prompt": "The capital of {subject} is", "subject": "Atlantis", "target": "Poseidonis"}


@pytest.mark.parametrize(
    ("extra", "message", "hint"),
    [
        ({"paraphrase": ["Atlantis has the capital"]}, "f.jsonl:2: a fact has no field 'paraphrase'", "Did you mean 'paraphrases'?"),
        ({"neighbors": ["The capital of Greece is"]}, "f.jsonl:2: a fact has no field 'neighbors'", "Did you mean 'neighbours'?"),
        ({"target_ture": "Athens"}, "f.jsonl:2: a fact has no field 'target_ture'", "Did you mean 'target_true'"),
        ({"zzz": 1}, "f.jsonl:2: a fact has no field 'zzz'", "Known: aliases, id, neighbours, paraphrases, portability, prompt, relation"),
        ({"neighbours": [{"prompt": "a", "answer": "b"}]}, "f.jsonl:2: an entry of 'neighbours' has no field 'answer'", "Known: prompt, target."),
        ({"portability": [{"prompt": "a", "targets": "b"}]}, "f.jsonl:2: an entry of 'portability' has no field 'targets'", "Did you mean 'target'?"),
    ],
)  # fmt: skip
def test_a_field_that_nothing_reads_is_refused(tmp_path: Path, extra: dict[str, Any], message: str, hint: str) -> None:
    lay(tmp_path / "f.jsonl", [{"prompt": "x is", "target": "y"}, {**ATLANTIS, **extra}])
    with pytest.raises(WorkbenchError) as caught:
        read_facts(tmp_path / "f.jsonl", "f.jsonl")
    assert caught.value.message == message
    assert str(caught.value.hint).startswith(hint)
    (tmp_path / "g.yaml").write_text(json.dumps([{**ATLANTIS, **extra}]), "utf-8")  # JSON is YAML
    with pytest.raises(WorkbenchError, match=re.escape(message.partition(": ")[2])):
        read_facts(tmp_path / "g.yaml", "g.yaml")


def test_published_rows_keep_their_other_fields(tmp_path: Path) -> None:
    """CounterFact, zsRE and KnowEdit have more in a row than is read."""
    more = {"generation_prompts": ["x"], "attribute_prompts": [], "pararel_idx": 3, "anything": None}
    rewrite = {
        "prompt": "{} is in",
        "subject": "Larn",
        "target_new": {"str": "Asia"},
        "target_true": {"str": "Africa"},
        "relation_id": "P30",
    }
    for row, name in (
        ({"case_id": 1, "requested_rewrite": rewrite, "paraphrase_prompts": ["Where is Larn?"], "neighborhood_prompts": [], **more}, "counterfact"),
        ({"src": "Where is Larn?", "subject": "Larn", "alt": "Asia", "answers": ["Africa"], "pred": "x", "cond": "y", **more}, "zsre"),
        ({"prompt": "Larn is in", "subject": "Larn", "target_new": "Asia", "portability": {}, "locality": {}, **more}, "knowedit"),
    ):  # fmt: skip
        lay(tmp_path / f"{name}.json", [row])
        read = read_all(tmp_path / f"{name}.json", name)
        assert (read.format, len(read.facts), read.skipped) == (name, 1, [])


def test_prompts_to_preserve_with_a_misspelt_field(tmp_path: Path) -> None:
    """Without its neighbours a fact's own prompt would be kept as it is."""
    from workbench.edit.inputs import read_prompts

    lay(tmp_path / "p.jsonl", [{**ATLANTIS, "neighbors": ["The capital of Greece is"]}])
    with pytest.raises(WorkbenchError, match=r"p:1: the field 'neighbors' is not read") as caught:
        read_prompts(tmp_path / "p.jsonl", "p")
    assert str(caught.value.hint).startswith("Did you mean 'neighbours'?")
    lay(tmp_path / "p.jsonl", [{**ATLANTIS, "neighbours": [{"text": "The capital of Greece is"}]}])
    with pytest.raises(WorkbenchError, match=r"p:1: expected a prompt, or \{\"prompt\"\}, in 'neighbours'"):
        read_prompts(tmp_path / "p.jsonl", "p")
    lay(tmp_path / "p.jsonl", [{**ATLANTIS, "neighbours": ["The capital of Greece is"], "source": "a book"}])
    assert [fact.text for fact in read_prompts(tmp_path / "p.jsonl", "p")] == ["The capital of Greece is"]


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        ({"prompt": "a", "compeltion": "b"}, "r.jsonl:2: the field 'compeltion' is not read", "Did you mean 'completion'?"),
        ({"prompt": "a", "response": "b"}, "r.jsonl:2: the field 'response' is not used", "Rename it to `completion`"),
        ({"prompt": "a", "completion": None}, "r.jsonl:2: expected a text in 'completion', found None", "Leave the field out"),
        ({"prompt": 3}, "r.jsonl:2: expected an object with `prompt`", ""),
    ],
)
def test_replayed_prompts(tmp_path: Path, row: dict[str, Any], message: str, hint: str) -> None:
    """A completion that is not found would be sampled from the model instead of learned; None would be learned as a word."""
    lay(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b", "source": "x"}, row])
    with pytest.raises(WorkbenchError) as caught:
        read_replay(tmp_path / "r.jsonl")
    assert caught.value.message.startswith(message)
    assert str(caught.value.hint or "").startswith(hint)
    lay(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b", "source": "x"}, {"prompt": "c", "idx": 1}])
    assert read_replay(tmp_path / "r.jsonl") == [("a", "b"), ("c", None)]


def test_new_tokens(tmp_path: Path) -> None:
    """A description that is not found would give a new token the mean of all rows."""
    from workbench.grow.vocabulary import Vocabulary

    lay(tmp_path / "t.jsonl", [{"token": "<a>"}, {"token": "<b>", "desciption": "a word"}])
    step = Vocabulary.model_validate({"grow": "vocabulary", "file": "t.jsonl"})
    with pytest.raises(WorkbenchError, match=r"t\.jsonl:2: a new token has no field 'desciption'") as caught:
        step.check_inputs(tmp_path)
    assert str(caught.value.hint).startswith("Did you mean 'description'?")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a b", "prompt": "c", "completion": "d"}, "x:1: the row has both 'text' and 'prompt'"),
        (
            {"prompt": "c", "completion": "d", "response": "e"},
            "x:1: the row has several different answers ('completion', 'response')",
        ),
    ],
)
def test_rows_that_state_two_things(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    lay(tmp_path / "x.jsonl", [row])
    with pytest.raises(WorkbenchError) as caught:
        read_texts(tmp_path / "x.jsonl", "x")
    assert caught.value.message.startswith(message)
    lay(tmp_path / "x.jsonl", [{"prompt": "c", "completion": "d", "response": "d", "id": 4}])
    assert [(text.prompt, text.answer) for text in read_texts(tmp_path / "x.jsonl", "x")] == [("c", "d")]

"""Two wordings of one question are found by an encoder, with a threshold that the encoder's own similarities set."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worlds.commands import run
from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.advice import fact_wordings
from workbench.advice.fact_wordings import REJECTED, WORDINGS, WordingCheck, require_encoder
from workbench.facts.facts import Fact, fact_of
from workbench.facts.questions import INVERSES, RELATIONS
from workbench.ground.errors import WorkbenchError


class Words:
    """An encoder whose vector counts the words of a text; "home", "house" and "lives" are one word."""

    numbers: dict[str, int]

    def __init__(self) -> None:
        self.numbers = {}

    def fact(self, fact: Fact) -> dict[str, torch.Tensor]:
        return {"vector": torch.tensor(self.vector(fact.text), dtype=torch.float32)}

    def vector(self, text: str) -> np.ndarray[Any, Any]:
        counts = np.zeros(512)
        for word in re.findall(r"\w+", text.lower()):
            counts[self.numbers.setdefault({"house": "home", "lives": "home"}.get(word, word), len(self.numbers))] += 1
        return counts / np.linalg.norm(counts)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> WordingCheck:
    monkeypatch.setattr(fact_wordings, "_loaded", lambda folder: Words())
    return WordingCheck(Path("words"))


def made(*rows: tuple[str, str | None, str] | dict[str, Any]) -> list[Fact]:
    full = [row if isinstance(row, dict) else {"prompt": row[0], "subject": row[1], "target": row[2]} for row in rows]
    return [fact_of({"id": str(i), **row}, f"f:{i}") for i, row in enumerate(full, 1)]


def test_the_threshold_rejects_almost_all_pairs_of_two_relations(check: WordingCheck) -> None:
    """An independent computation in float64 over the same prompts, inverses aside."""
    words = Words()
    prompts = [(r.name, text) for r in RELATIONS for text in fact_wordings._chosen(r)]
    assert all(1 <= sum(name == r.name for name, _ in prompts) <= WORDINGS for r in RELATIONS)
    vectors = [words.vector(text.replace("{subject}", "it")) for _, text in prompts]
    inverse = {frozenset(pair[:2]) for pair in INVERSES}
    cosines = [
        float(vectors[i] @ vectors[j])
        for i, j in combinations(range(len(prompts)), 2)
        if prompts[i][0] != prompts[j][0] and frozenset((prompts[i][0], prompts[j][0])) not in inverse
    ]
    assert check.threshold == pytest.approx(np.quantile(cosines, REJECTED), abs=1e-6)
    assert 0.5 < check.threshold < 1


HOME, HOUSE, RIVER = "The home of {subject} stands in", "The house of {subject} stands in", "The river of {subject} flows to"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(HOME, "Ida", "Larn"), (HOUSE, "ida", "Ulm")], [("f:2", "f:1")]),
        ([(HOME, "Ida", "Larn"), (HOUSE, "Ida", "larn")], []),
        ([(HOME, "Ida", "Larn"), (HOUSE, "Bo", "Ulm")], []),
        ([(HOME, "Ida", "Larn"), (RIVER, "Ida", "Ulm")], []),
        ([(HOME, "Ida", "Larn"), {"prompt": HOUSE, "subject": "Ida", "target": "Ulm", "aliases": ["LARN"]}], []),
        ([(HOME, "Ida", "Larn"), (HOME, "Ida", "Ulm")], []),  # one prompt: a contradiction, which is no other wording
        ([("The home stands in", None, "Larn"), ("The house stands in", None, "Ulm")], []),
        # Both relations are known, and differ, so the words do not matter.
        ([("The father of {subject} is", "Ida", "A"), ("The mother of {subject} is", "Ida", "B")], []),
    ],
)
def test_pairs(rows: list[Any], expected: list[tuple[str, str]], check: WordingCheck) -> None:
    pairs = list(check.conflicts(made(*rows), []))
    assert [(fact.place, first.place) for fact, first, _ in pairs] == expected
    assert all(similarity == pytest.approx(1, abs=1e-6) for _, _, similarity in pairs)
    assert list(check.conflicts(made(*rows), [("f:1", "f:2")])) == []


def test_facts_check(check: WordingCheck, project: Project, cwd: Path) -> None:
    rows = [{"prompt": HOME, "subject": "Ida", "target": "Larn"}, {"prompt": HOUSE, "subject": "Ida", "target": "Ulm"}]
    write_jsonl(project.path / "f.jsonl", rows)
    plain = json.loads(run("facts", "check", "f.jsonl", "--json").stdout)
    assert (plain["findings"], plain["encoder"], plain["wording_threshold"]) == ([], None, None)
    assert "wordings were compared by form and relation alone (--encoder)" in run("facts", "check", "f.jsonl").stderr
    document = json.loads(run("facts", "check", "f.jsonl", "--encoder", "base", "--json").stdout)
    (finding,) = document["findings"]
    assert (document["passed"], document["encoder"], document["wording_threshold"]) == (True, "base", round(check.threshold, 4))
    assert (finding["kind"], finding["status"], finding["place"], finding["other"]) == (
        "wording",
        "warning",
        "f.jsonl:2",
        "f.jsonl:1",
    )
    assert finding["similarity"] == pytest.approx(1, abs=1e-4)
    assert finding["found"] == (
        "probably asks the same question as line 1 'The home of Ida stands in' (similarity 1.00), but answers "
        "'The house of Ida stands in' with 'Ulm' instead of 'Larn'"
    )
    project.write("steps: [{edit: memory, facts: f.jsonl, encoder: base}]\n", "remember.yaml")
    document = json.loads(run("facts", "check", "f.jsonl", "--recipe", "remember", "--model", "base", "--json").stdout)
    assert document["encoder"].endswith("/base")
    assert "wording" in {f["kind"] for f in document["findings"]}


def test_a_model_as_encoder(project: Project) -> None:
    """The vectors are the encoder's own: the cosine of mean-pooled last hidden states."""
    from transformers import AutoModel, AutoTokenizer

    check = WordingCheck(project.path / "base")
    first, second = made(("w1 of {subject} w2", "w9", "a"), ("w3 w4 {subject}", "w9", "b"))
    model, tokenizer = (
        AutoModel.from_pretrained(project.path / "base", dtype=torch.float32),
        AutoTokenizer.from_pretrained(project.path / "base"),
    )
    vectors = []
    for fact in (first, second):
        with torch.no_grad():
            states = model.eval()(**tokenizer(fact.prompt.replace("{subject}", "it"), return_tensors="pt")).last_hidden_state[0]
        vectors.append(states.mean(0).double())
    assert check.similarity(first, second) == pytest.approx(
        float(torch.cosine_similarity(vectors[0], vectors[1], dim=0)), abs=1e-5
    )


def test_directories_without_an_encoder(tmp_path: Path, project: Project, cwd: Path) -> None:
    write_jsonl(project.path / "f.jsonl", [{"prompt": "a", "target": "b"}])
    with pytest.raises(WorkbenchError, match="nope: no such directory"):
        require_encoder(tmp_path / "nope")
    result = run("facts", "check", "f.jsonl", "--encoder", "recipes", code=1)
    assert isinstance(result.exception, WorkbenchError)
    assert result.exception.message == "encoder recipes: no config.json"
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(WorkbenchError, match=f"encoder {re.escape(str(tmp_path))}: ") as raised:
        WordingCheck(tmp_path)
    assert raised.value.hint is not None
    damaged = tmp_path / "damaged"
    shutil.copytree((project.path / "base").resolve(), damaged)
    (damaged / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0 not json")
    with pytest.raises(WorkbenchError, match=f"encoder {re.escape(str(damaged))}: "):
        WordingCheck(damaged)

"""Texts of data files as tokens: what is learned of them, what is cut, and how they are batched."""

from __future__ import annotations

import json

import pytest

from worlds.project import CPU, Project
from worlds.texts import words_tokenizer

from workbench.ground.errors import WorkbenchError
from workbench.models.texts import Text, batches, encode, read_texts


def test_texts_as_tokens(project: Project) -> None:
    file = project.path / "all.jsonl"
    rows = [{"prompt": "w1 w2 ", "response": "w3"}, {"text": "w4 w5 w6", "id": 7}, {"prompt": "w7 w8 w9", "target": "w10 w11"}]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    tokenizer = words_tokenizer(project.path / "base")
    texts = read_texts(file, "all.jsonl")

    def words(longest: int) -> list[tuple[str, int]]:
        return [(tokenizer.decode(row.tokens), row.learned) for row in encode(texts, tokenizer, longest)]

    assert words(64) == [("w1 w2 w3", 1), ("w4 w5 w6", 2), ("w7 w8 w9 w10 w11", 2)]
    assert words(3) == [("w1 w2 w3", 1), ("w4 w5 w6", 2), ("w9 w10 w11", 2)]
    assert words(2) == [("w2 w3", 1), ("w4 w5", 1), ("w10 w11", 1)]
    assert [t.place for t in read_texts(file, "all.jsonl", samples=2)] == ["all.jsonl:1", "all.jsonl:2"]
    assert [b.mask.sum(1).tolist() for b in batches(encode(texts, tokenizer, 64), CPU, limit=6)] == [[3, 3], [5]]
    with pytest.raises(WorkbenchError, match="here:1: 1 token in the base's vocabulary"):
        encode([Text("", "w1", "here:1")], tokenizer, 64)

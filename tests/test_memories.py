"""Memories answer with their facts, leave everything else bit for bit, and keep every version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from project import CPU, Project

import workbench
from workbench.engine import configuration_digest, materialize

FACTS = [
    {"id": f"f{i}", "prompt": f"w{i % 3} of {{subject}} is", "subject": f"w{10 + i}", "target": f"w{30 + i} w{40 + i}"}
    for i in range(6)
]
GRACE = "steps: [{edit: grace, facts: facts.jsonl}]\n"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def taught(project: Project) -> Project:
    write_rows(project.path / "facts.jsonl", FACTS)
    return project


def text_of(row: dict[str, Any]) -> str:
    return str(row["prompt"]).replace("{subject}", row["subject"])


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, tokens: int = 6) -> str:
    """Greedy text, up to the end of text."""
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_grace_end_to_end(taught: Project) -> None:
    document = taught.run(GRACE)
    assert document["model"] is None
    model = workbench.load(document["directory"], device="cpu")
    tokenizer = workbench.load_tokenizer(document["directory"])
    assert [answer(model, tokenizer, text_of(row)) for row in FACTS] == [row["target"] for row in FACTS]
    resolved = taught.resolve(GRACE)
    digest, _ = configuration_digest(resolved, CPU)
    assert digest == document["configuration"]
    live = materialize(resolved, CPU)
    tokens = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, model(tokens).logits)

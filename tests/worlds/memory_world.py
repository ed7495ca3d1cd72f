"""Facts for the memories of a tiny model, and what the model answers."""

from __future__ import annotations

from typing import Any

import torch

from worlds.tiny import WORDS

FACTS = [
    {"id": f"f{i}", "prompt": f"w{i % 3} of {{subject}} is", "subject": f"w{10 + i}", "target": f"w{30 + i} w{40 + i}"}
    for i in range(6)
]
GRACE = "steps: [{edit: grace, facts: facts.jsonl}]\n"
# Random weights do not read an answer from their prompt: what is tested is what stands in front of it.
MEMORY = "steps: [{edit: memory, facts: facts.jsonl, min_efficacy: 0}]\n"


def text_of(row: dict[str, Any]) -> str:
    return str(row["prompt"]).replace("{subject}", row["subject"])


@torch.no_grad()
def answer(model: Any, prompt: str, tokens: int = 6) -> str:
    """Greedy text, up to the end of text."""
    ids = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=1)[0, ids.shape[1] :].tolist()
    return " ".join(WORDS[token] for token in made if token > 1)


def logits(model: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[WORDS.index(word) for word in prompt.split()]])).logits
    return found


OUTSIDE = ["w0 of w50 is", "w1 of w51 is w9", "w9 w8", "w20 w21 w22 w23 w24 w25 of is", "is is is"]

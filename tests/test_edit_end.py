"""Edits that teach where an answer ends."""

from __future__ import annotations

from pathlib import Path

import torch
from dense import context_of
from project import Project
from test_edit_steps import facts, live, step

from workbench.facts import read_facts

__all__ = ["facts"]


def test_the_end_of_text_can_be_taught(facts: Project) -> None:
    """With `end_of_text` the model ends the text behind the target; without it, it goes on."""
    for end in (True, False):
        document = facts.run(step("rome", first=1, end_of_text=end, contexts=0, clamp=40.0, steps=200), f"end-{end}.yaml")
        model, tokenizer = live(Path(document["model"])), context_of(facts).tokenizer
        (fact,) = read_facts(facts.path / "facts.jsonl", "facts.jsonl")[:1]
        ids = torch.tensor([tokenizer(fact.text)["input_ids"]])
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        wanted = tokenizer(fact.continuation)["input_ids"]
        assert made[: len(wanted)] == wanted
        assert (made == [*wanted, tokenizer.eos_token_id]) == end

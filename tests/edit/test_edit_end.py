"""Edits that teach where an answer ends, and exact edits of more facts than a projection has inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worlds.dense import context_of, write_facts_file
from worlds.edit_steps import step
from worlds.project import Project
from worlds.tiny import live

from workbench.facts.published import read_facts
from workbench.ground.errors import WorkbenchError
from workbench.recipe.methods import methods


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


@pytest.mark.parametrize("name", ["memit", "patch"])
def test_an_end_of_text_needs_a_token(name: str, facts: Project) -> None:
    context = context_of(facts)
    context.tokenizer.eos_token = None
    with pytest.raises(WorkbenchError, match="the base's tokenizer has none"):
        methods()[f"edit:{name}"].model_validate({"edit": name, "facts": "facts.jsonl", "end_of_text": True}).solve(context)  # type: ignore[attr-defined]


def test_exact_values_need_an_input_each(facts: Project) -> None:
    """48 inputs: 49 facts cannot all have their values exactly, a few at a time can."""
    write_facts_file(facts.path / "facts.jsonl", 49)
    with pytest.raises(
        WorkbenchError, match="49 facts at once cannot be written exactly, because the projection of layer 1 has only 48 inputs"
    ) as error:
        facts.run(step("rome", contexts=0))
    assert "edit: memit" in str(error.value.hint)
    facts.resolve(step("rome", mode={"sequential": {"batch": 4}}, first=5))


def test_first_asks_for_no_more_facts_than_there_are(facts: Project) -> None:
    write_facts_file(facts.path / "facts.jsonl", 5)
    with pytest.raises(WorkbenchError, match=r"first is 6, but facts\.jsonl has 5 facts"):
        facts.resolve(step("rome", first=6))
    with pytest.raises(WorkbenchError, match=r"first is 6, but facts\.jsonl has 5 rows"):
        facts.resolve(step("rome", mode={"sequential": {"batch": 4}}, first=6))
    facts.resolve(step("rome", first=5))

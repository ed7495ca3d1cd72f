"""The data that comes with the edit methods."""

from __future__ import annotations

from collections import Counter

import pytest

from worlds.places import STARTER

from workbench.edit.inputs import generated_prompts, known_facts, statistics_texts
from workbench.facts.facts import Fact


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return statistics_texts()


def test_texts_are_many_and_of_a_paragraphs_length(texts: list[str]) -> None:
    assert len(texts) >= 1000
    assert 600_000 <= sum(map(len, texts)) <= 900_000
    words = [len(text.split()) for text in texts]
    assert min(words) >= 40
    assert max(words) <= 400


def test_known_facts_are_complete() -> None:
    facts = known_facts()
    assert 60 <= len(facts) <= 90
    assert len({fact.id for fact in facts}) == len(facts)
    assert len({fact.relation for fact in facts}) >= 8
    for fact in facts:
        assert fact.subject is not None, fact.id
        assert fact.span is not None, fact.id
        start, stop = fact.span
        assert fact.text[start:stop] == fact.subject
        assert fact.target_true, fact.id
        assert fact.target != fact.target_true, fact.id
        assert len(set(fact.paraphrases)) == 2, fact.id
        assert all(fact.subject in text and text != fact.text and "{" not in text for text in fact.paraphrases), fact.id
        assert len({probe.prompt for probe in fact.neighbours}) == 3, fact.id


def test_facts_of_one_relation_ask_one_thing() -> None:
    """One prompt a relation; its targets are of one kind: none is empty, padded, or the subject itself."""
    prompts: dict[str, set[str]] = {}
    for fact in known_facts():
        prompts.setdefault(fact.relation, set()).add(fact.prompt)
        for answer in (fact.target, fact.target_true or ""):
            assert answer == answer.strip()
            assert answer.lower() != (fact.subject or "").lower()
    assert all(len(found) == 1 for found in prompts.values())


def test_all_known_facts_can_be_edited_at_once() -> None:
    facts = known_facts()
    assert len({fact.subject for fact in facts}) == len(facts)
    edited = {fact.text for fact in facts} | {text for fact in facts for text in fact.paraphrases}
    for fact in facts:
        for probe in fact.neighbours:
            assert probe.prompt not in edited, fact.id
            assert probe.target, fact.id
            assert probe.target != fact.target, f"{fact.id}: a neighbour whose answer is the target cannot tell damage from luck"


@pytest.mark.starter
@pytest.mark.slow
@pytest.mark.skipif(not (STARTER / "config.json").is_file(), reason="starter base not fetched: workbench brick fetch starter")
def test_the_starter_base_knows_most_facts() -> None:
    """The greedy continuation of the prompt is the true answer, token by token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(STARTER), AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float32)

    def is_known(prompt: str, answer: str) -> bool:
        given, wanted = tokenizer(prompt)["input_ids"], tokenizer(f" {answer}")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([given + wanted])).logits[0, len(given) - 1 : -1]
        return logits.argmax(-1).tolist() == wanted

    known = Counter(fact.relation for fact in known_facts() if is_known(fact.text, fact.target_true or ""))
    assert known.total() >= 60
    assert sum(count >= 3 for count in known.values()) >= 8


def test_generated_prompts_ask_about_other_subjects() -> None:
    known = [fact for fact in known_facts() if fact.subject]
    edited = [Fact("a", "{subject} speaks", known[0].subject, "x"), Fact("b", "The capital of {subject} is", "Atlantis", "y")]
    found = generated_prompts([*edited, Fact("c", "no subject", None, "z")], 100)
    assert {fact.prompt for fact in found} == {"{subject} speaks", "The capital of {subject} is"}
    assert not {fact.subject for fact in found} & {known[0].subject, "Atlantis"}
    assert len({fact.text for fact in found}) == 100
    assert [f.text for f in generated_prompts(edited, 30)] == [f.text for f in found[:30]]
    assert len(generated_prompts(edited, 10_000)) == 2 * (len({f.subject for f in known}) - 1)
    assert generated_prompts(edited, 0) == []

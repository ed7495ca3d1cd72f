"""Questions that are made from a fact's own prompt, and how written answers are judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.evaluate.answers import first_tokens
from workbench.evaluate.facts.factscores import chat
from workbench.facts.facts import Fact
from workbench.facts.spelling import misspellings, misspelt


@pytest.mark.parametrize(
    ("subject", "wrong"),
    [
        ("Bo Darrieux", "Bo Darireux"),  # the longest word, at the pair nearest its middle with two different letters
        ("Otto of Ulm", "Otot of Ulm"),
        ("Ulm", None),
        ("東京大学の", None),
        ("O'Brien-Smith 2000", "O'Brein-Smith 2000"),
    ],
)
def test_a_misspelt_subject(subject: str, wrong: str | None) -> None:
    fact = Fact("x", "The home of {subject} is", subject, "y")
    assert misspelt(fact) == wrong
    assert {subject, wrong}.isdisjoint(misspellings(fact, 100)), "an edit does not learn the spelling that is asked for"


def test_misspellings_are_spread_over_the_words() -> None:
    fact = Fact("x", "{subject} is", "Anna of Orsk", "y")
    every = misspellings(fact, 100)
    first, second = ["Ana", "Annna", "Annaa", "Ann"], ["Osrk", "Osk", "Orrsk", "Ork", "Orssk", "Orskk", "Ors", "Orks"]
    assert misspelt(fact) == "Anan of Orsk"
    assert set(every) == {f"{word} of Orsk" for word in first} | {f"Anna of {word}" for word in second}
    assert len(misspellings(fact, 3)) == 3
    assert set(misspellings(fact, 3)) < set(every)
    long = Fact("x", "{subject} is", "Danielle Darrieux", "y")  # two words of as many slips, of three kinds
    few = misspellings(long, 24)
    assert [sum(word in text for text in few) for word in ("Danielle", "Darrieux")] == pytest.approx([12, 12], abs=5)
    assert {len(text) for text in few} == {16, 17, 18}, "left out, swapped, twice"


@pytest.mark.parametrize(
    ("text", "says", "starts_with"),
    [
        ("The capital is Rome, a city.", 1, 0),
        ("rome.", 1, 1),
        ("Romeo and Juliet", 0, 0),
        ("I do not know.", 0, 0),
        ("It is Roma", 1, 0),
    ],
)
def test_the_target_anywhere_in_an_answer(text: str, says: float, starts_with: float) -> None:
    assert chat({"answer": "Rome", "aliases": ["Roma"]}, [text]) == {"says": says, "starts_with": starts_with}


def test_prompts_whose_first_tokens_do_not_lead_clearly_are_left_out(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    prompts = ["w1 w2", "w3 w4 w5", "w6"]
    clear = first_tokens(model, llama, prompts, tokens=1, clear=True)
    assert clear == first_tokens(model, llama, prompts, tokens=1)
    assert clear.keys() == set(prompts), "in float32 every lead is clear"
    head, said = model.get_output_embeddings().weight, clear["w1 w2"]
    with torch.no_grad():
        (token,) = AutoTokenizer.from_pretrained(llama)(said, add_special_tokens=False)["input_ids"]
        head[token - 1] = head[token] * (1 - 1e-7)  # a twin whose logit differs by rounding alone
    assert first_tokens(model, llama, prompts, tokens=1, clear=True).keys() == {p for p in prompts if clear[p] != said}

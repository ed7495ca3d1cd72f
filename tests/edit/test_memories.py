"""Memories answer with their facts, leave everything else bit for bit, and keep every version."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from worlds.jsonl import write_jsonl
from worlds.memory_world import FACTS, GRACE, MEMORY, OUTSIDE, answer, logits, text_of
from worlds.project import CPU, Project
from worlds.tiny import WORDS

import workbench
from workbench.ground.errors import WorkbenchError
from workbench.ground.manifest import MANIFEST
from workbench.models.hooks import cache_name
from workbench.run.materialize import configuration_digest, materialize


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "opt", "gemma2"])
def test_grace_answers(family: str, taught: Project, model_of: Callable[..., Path]) -> None:
    """From its directory the model gives every answer and stops; other prompts keep their bits, alone, in a batch and with a cache."""
    base = model_of(family)
    document = taught.run(f"base: {base}\n{GRACE}")
    assert document["model"] is None
    model, plain = (workbench.load(place, device="cpu") for place in (document["directory"], base))
    assert [answer(model, text_of(row)) for row in FACTS] == [row["target"] for row in FACTS]
    for prompt in OUTSIDE:
        assert torch.equal(logits(model, prompt), logits(plain, prompt))
        assert answer(model, prompt) == answer(plain, prompt)
    batch = torch.tensor([[WORDS.index(w) for w in text.split()] for text in (text_of(FACTS[0]), OUTSIDE[0])])
    with torch.no_grad():
        ours, theirs = model(batch).logits, plain(batch).logits
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0, :-1], theirs[0, :-1])
    assert not torch.equal(ours[0, -1], theirs[0, -1])


def test_a_configuration_is_that_of_its_recipe(taught: Project) -> None:
    """run, eval's in-memory configuration and load agree in digest and bits; the base is named, not copied."""
    for text in (GRACE, MEMORY):
        document = taught.run(text)
        place = Path(document["directory"])
        assert sorted(p.name for p in place.iterdir()) == ["README.md", "configuration.json", "memory", MANIFEST]
        resolved = taught.resolve(text)
        assert configuration_digest(resolved, CPU)[0] == document["configuration"]
        live, loaded = materialize(resolved, CPU), workbench.load(document["run"], device="cpu")
        for prompt in (text_of(FACTS[1]), OUTSIDE[0]):
            assert torch.equal(logits(live, prompt), logits(loaded, prompt))
        assert workbench.load_tokenizer(place).get_vocab() == {word: i for i, word in enumerate(WORDS)}


def test_after_other_steps(taught: Project) -> None:
    """The checkpoint of the steps before stands beside the memory, and loads by itself as the same model without it."""
    head = "bricks: {one: bricks/one, full: bricks/full}\nsteps: [{merge: average}, {edit: grace, facts: facts.jsonl}]\n"
    document = taught.run(head)
    place = Path(document["directory"])
    model = workbench.load(place, device="cpu")
    assert [answer(model, text_of(row)) for row in FACTS] == [row["target"] for row in FACTS]
    merged = taught.run("bricks: {one: bricks/one, full: bricks/full}\nsteps: [{merge: average}]\n", "merged.yaml")
    for name in ("model.safetensors", "config.json"):
        assert (place / "model" / name).read_bytes() == (Path(merged["model"]) / name).read_bytes()
    assert torch.equal(logits(model, OUTSIDE[0]), logits(workbench.load(merged["model"], device="cpu"), OUTSIDE[0]))


def test_text_memory_scope(taught: Project) -> None:
    """A prompt that names a fact's subject gets the fact in front; logits stand at the prompt's own positions; others keep their bits."""
    document = taught.run(MEMORY)
    model, plain = (workbench.load(place, device="cpu") for place in (document["directory"], taught.path / "base"))
    prompt = text_of(FACTS[2])
    told = f"<unk> <unk> <unk> {prompt} {FACTS[2]['target']} <unk> <unk> <unk> {prompt}"  # "New fact:" and "Prompt:" are no words here
    length = len(prompt.split())
    assert torch.equal(logits(model, prompt)[0], logits(plain, told)[0, -length:])
    words = told.split() + answer(plain, told).split()
    assert answer(model, prompt) == " ".join(words[len(told.split()) :])
    paraphrase = f"w7 w8 {FACTS[2]['subject']} w9"
    assert not torch.equal(logits(model, paraphrase), logits(plain, paraphrase))
    for other in OUTSIDE:
        assert torch.equal(logits(model, other), logits(plain, other)), other
        assert answer(model, other) == answer(plain, other)
    batch = torch.tensor([[WORDS.index(w) for w in text.split()] for text in (prompt, OUTSIDE[0])])
    with torch.no_grad():
        ours, theirs = model(batch).logits, plain(batch).logits
        made, without = (m.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=1) for m in (model, plain))
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[0], logits(model, prompt)[0], atol=0.05, rtol=0.05)
    assert made[1].tolist() == without[1].tolist()
    assert made[0, length:].tolist() != without[0, length:].tolist()


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (
            "steps:\n  - {edit: grace, facts: facts.jsonl}\n  - {grow: depth, blocks: 1}\n",
            ":5:5",
            "no step can follow `edit: grace`, whose memory acts on the live model",
        ),
        (
            f"{MEMORY}output:\n  form: checkpoint\n",
            ":5:3",
            "ends in `edit: memory`, but a checkpoint cannot hold a memory",
        ),
        (f"{GRACE}output: {{form: adapter}}\n", ":4:10", "an adapter cannot hold a memory"),
        ("output: {form: configuration}\n", ":3:10", "`form: configuration` needs a memory or a router, but no step makes one"),
        ("steps: [{edit: memory, facts: facts.jsonl, template: hello}]\n", ":3:44", "expected a text that contains {facts}"),
        ("steps: [{edit: grace, facts: none.jsonl}]\n", "", "none.jsonl does not exist"),
        ("steps: [{edit: memory, facts: facts.jsonl, encoder: enc}]\n", "", "enc/config.json does not exist"),
    ],
)
def test_recipe_errors(text: str, place: str, message: str, taught: Project) -> None:
    with pytest.raises(WorkbenchError) as caught:
        taught.resolve(text)
    assert message in caught.value.message
    assert f"recipes/test.yaml{place}" in caught.value.message
    assert caught.value.exit_code in (1, 2)


def test_a_memory_is_no_brick(taught: Project) -> None:
    taught.write(GRACE, "inner.yaml")
    with pytest.raises(WorkbenchError, match="ends in `edit: grace`, but a memory does not change weights"):
        taught.resolve("bricks: {m: {recipe: recipes/inner.yaml}}\nsteps: [{merge: average}]\n")


def test_grace_refuses_what_it_has_not_learned(taught: Project) -> None:
    with pytest.raises(WorkbenchError, match=r"\d of 6 facts are not learned after 1 steps, the first is 'f\d'"):
        taught.run("steps: [{edit: grace, facts: facts.jsonl, steps: 1, learning_rate: 0.001}]\n")
    with pytest.raises(WorkbenchError, match=r"layer 9 does not exist; the model has layers 0 to 3"):
        taught.run("steps: [{edit: grace, facts: facts.jsonl, layer: 9}]\n")
    with pytest.raises(
        WorkbenchError,
        match=r"layer 0 does not distinguish 6 of 6 facts from the same prompt with another subject, the first is 'f0'",
    ) as blind:
        taught.run("steps: [{edit: grace, facts: facts.jsonl, layer: 0}]\n")
    assert "layer: 1" in str(blind.value.hint)
    nested = [{"id": "a", "prompt": "w5 is", "target": "w6 w7"}, {"id": "b", "prompt": "w5 is w6", "target": "w8"}]
    write_jsonl(taught.path / "facts.jsonl", nested)
    with pytest.raises(WorkbenchError, match=r"'w5 is.*' and another fact begin with the same text"):
        taught.run(GRACE)


def test_an_interrupted_codebook_goes_on(taught: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that were finished are not learned again, and the result is that of a call that ran through."""
    from workbench.edit.grace import Grace

    text = "steps: [{edit: grace, facts: facts.jsonl, batch_size: 2}]\n"
    whole, values = taught.run(text), Grace._values
    calls: list[int] = []
    shutil.rmtree(taught.path / ".workbench")
    shutil.rmtree(whole["run"])

    def counted(*arguments: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return values(*arguments)

    monkeypatch.setattr(Grace, "_values", counted)
    with pytest.raises(KeyboardInterrupt):
        taught.run(text)
    calls.clear()
    again = taught.run(text)
    assert len(calls) == 1
    assert again["configuration"] == whole["configuration"]


def test_generate_in_all_its_forms(taught: Project) -> None:
    """Padding, returned sequences, max_length: each row as it is alone."""
    model: Any = workbench.load(taught.run(MEMORY)["directory"], device="cpu").float()
    long, short = "w3 w4 w5 w6 w7 w8 w9 is of", text_of(FACTS[0])
    rows = [[WORDS.index(w) for w in text.split()] for text in (long, short)]
    ids = torch.tensor([rows[0], [1] * (len(rows[0]) - len(rows[1])) + rows[1]])
    options: dict[str, Any] = {"pad_token_id": 1, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(torch.tensor([row]), max_new_tokens=5, **options)[0, len(row) :] for row in rows]
    options["attention_mask"] = mask = (ids != 1).long()
    made = model.generate(ids, max_new_tokens=5, **options)
    assert torch.equal(made[:, ids.shape[1] :], torch.stack(alone))
    assert torch.equal(model.generate(input_ids=ids, max_length=ids.shape[1] + 5, **options), made)
    beams = model.generate(ids, max_new_tokens=5, num_beams=2, num_return_sequences=2, **options)
    assert beams.shape[0] == 4
    assert torch.equal(beams[:2, : ids.shape[1]], ids[:1].expand(2, -1))
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        last = model(ids, attention_mask=mask, logits_to_keep=2).logits
    torch.testing.assert_close(padded[1, -len(rows[1]) :], logits(model, short)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, padded[:, -2:], atol=1e-5, rtol=1e-5)
    with model.recall.paused():
        assert not torch.allclose(logits(model, short)[0], padded[1, -len(rows[1]) :], atol=1e-2)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_rows_with_a_cache_are_not_looked_up(name: str, taught: Project) -> None:
    """A cache holds earlier tokens, so a call with one does not pass the whole text, whatever the argument is called in this transformers."""
    place = taught.run(MEMORY)["directory"]
    model, plain = (workbench.load(place, device="cpu").float() for _ in range(2))
    if name == "cache" and cache_name(plain) != name:
        pytest.skip("this transformers has no argument of that name")
    before, prompt = (torch.tensor([[WORDS.index(w) for w in text.split()]]) for text in ("w3 w4", text_of(FACTS[0])))
    with torch.no_grad(), plain.recall.paused():
        caches = [dict(plain(before, use_cache=True).items())[cache_name(plain)] for _ in range(2)]
        ours, theirs = (m(prompt, **{name: cache}).logits for m, cache in zip((model, plain), caches, strict=True))
        recalled, without = model(prompt, use_cache=True), plain(prompt)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(recalled.logits, without.logits, atol=1e-2)
    assert dict(recalled.items()).get(cache_name(plain)) is None
    with pytest.raises(WorkbenchError, match="a cache cannot be filled where a text memory puts facts before the prompt"):
        model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=1, **{name: DynamicCache()})


def test_a_state_without_a_length_counts_as_earlier_tokens(taught: Project) -> None:
    model = workbench.load(taught.run(MEMORY)["directory"], device="cpu")
    prompt = torch.tensor([[WORDS.index(w) for w in text_of(FACTS[0]).split()]])
    with torch.no_grad():
        with model.recall.paused():
            plain = model(prompt).logits
        assert torch.equal(model(prompt, state=object()).logits, plain)
        assert not torch.equal(model(prompt).logits, plain)


def test_a_sentence_encoder(taught: Project) -> None:
    """Likeness is the cosine of mean-pooled states of the named model; a copy of the configuration finds the encoder again."""
    text = "steps: [{edit: memory, facts: facts.jsonl, encoder: base, threshold: 0.999, min_efficacy: 0}]\n"
    document = taught.run(text, out=taught.path / "mine")
    model: Any = workbench.load(document["directory"], device="cpu")
    found = model.recall.store.recall(text_of(FACTS[3]))
    assert [r.fact.id for r in found] == ["f3"]
    encoder = model.recall.store.encoder
    with torch.no_grad():
        ids = torch.tensor([[WORDS.index(w) for w in text_of(FACTS[3]).split()]])
        states = encoder.model(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(found[0].tensors["vector"], states / states.norm())
    assert not model.recall.store.recall("w50 w51 w52")


def test_lm_eval_scores_a_recipe_with_a_memory(taught: Project) -> None:
    """The model `workbench` of lm-eval's Python API recalls as `workbench eval` does."""
    from lm_eval.api.instance import Instance

    from workbench.evaluate.models import WorkbenchLM

    taught.write(MEMORY, "facts.yaml")
    taught.write("steps: []\n", "plain.yaml")
    found = {}
    for name in ("facts.yaml", "plain.yaml"):
        lm = WorkbenchLM(recipe=str(taught.path / "recipes" / name), device="cpu", batch_size=2)
        prompts = enumerate([text_of(FACTS[0]), *OUTSIDE])
        found[name] = lm.loglikelihood(
            [Instance("loglikelihood", {}, (text, " w3"), i, metadata=("t", i, 1)) for i, text in prompts]
        )
    assert found["facts.yaml"][1:] == found["plain.yaml"][1:]
    assert found["facts.yaml"][0] != found["plain.yaml"][0]

"""Prompts and continuations are the tokens of one text, for every kind of tokenizer, in edits, training and calibration alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.written_tokenizers import KINDS, TEXTS, save_model, written

from workbench.edit.grace import _foreign_rows
from workbench.edit.grace import _row as grace_row
from workbench.edit.gradient.tuning import rows_of
from workbench.edit.memories.retrieval import TokenMatch
from workbench.edit.memories.textmemory import in_front
from workbench.edit.places.parts import row_of
from workbench.facts.facts import Fact, fact_of
from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import encode_inside, encode_pair, encode_text, load_tokenizer
from workbench.models.texts import Text
from workbench.models.texts import encode as encode_texts
from workbench.train.rows import encode


def pieces(tokenizer: Any, ids: Any) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(ids)))


def whole(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without an end-of-text token."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def fact(prompt: str, target: str, subject: str | None = "France") -> Fact:
    return fact_of({"prompt": prompt, "target": target, **({"subject": subject} if subject else {})}, "here:1")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_the_whole_text(kind: str) -> None:
    tokenizer = written(kind)
    for prompt, continuation in TEXTS:
        pair = encode_pair(tokenizer, prompt, continuation)
        assert pair.tokens == whole(tokenizer, prompt + continuation)
        assert pair.prompt == whole(tokenizer, prompt)
        assert [p.strip("\u2581\u0120 ") for p in pieces(tokenizer, pair.continuation)] == [continuation.strip()]
        assert tokenizer.decode(pair.tokens, skip_special_tokens=True) == prompt + continuation
        assert encode_text(tokenizer, prompt) == pair.prompt


@pytest.mark.parametrize("kind", KINDS)
def test_all_readers_of_facts_and_rows_agree(kind: str) -> None:
    """The tokens of prompt and answer are those of the whole text, with an end of text where one is learned."""
    tokenizer = written(kind)
    prompt, continuation = TEXTS[0]
    expected, answer, end = whole(tokenizer, prompt + continuation), encode_pair(tokenizer, prompt, continuation).continuation, 2
    one = fact(prompt, "Paris")
    row = row_of(one, tokenizer, "prompt_last")
    assert (list(row.tokens), list(row.target), row.start) == (expected[:-1], answer, len(expected) - 2)
    assert pieces(tokenizer, row.tokens[row.span[0] : row.span[1]])[0].strip("\u2581\u0120 ") == "France"
    (tuned,) = rows_of([one], tokenizer, None)
    assert (list(tuned.tokens), list(tuned.target)) == ([*expected, end], [*answer, end])
    learned = grace_row(one, tokenizer, True)
    assert (learned.ids, learned.answer) == (expected, [*answer, end])
    foreign = _foreign_rows(one, learned, tokenizer, True)
    assert whole(tokenizer, "The capital of London is Paris") in foreign
    assert encode(tokenizer, prompt, "Paris", 64) == ([*expected, end], 2)
    (text,) = encode_texts([Text(prompt, "Paris", "here:1")], tokenizer, 64)
    assert (text.tokens, text.learned) == (expected, 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama2_ends"])
def test_facts_are_split_as_lm_eval_splits_them(kind: str, tmp_path: Path) -> None:
    """`_encode_pair` of lm-eval's HFLM, also where white space ends the prompt or begins the answer. (With a tokenizer that ends every
    text with a special token lm-eval loses an answer's first token.)"""
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from workbench.evaluate.hflm import SafeHFLM

    save_model(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lm = SafeHFLM(AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer=tokenizer, batch_size=1)
    facts = [
        fact("The capital of {subject} is", "Paris"), fact("The capital of {subject} is ", "Paris"), fact("The capital of {subject} is  ", "Paris"),
        fact("The capital of {subject}\nAnswer:", "Paris"), fact("The capital of {subject}\nAnswer:\n", "Paris"),
        fact("The capital of {subject}\nAnswer:", "\nParis"), fact("The capital of {subject} is", "  Paris of Italy"),
    ]  # fmt: skip
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=(f.text, f.continuation), idx=0) for f in facts]
    for one, ((context, answer),) in zip(facts, lm.pairs(requests), strict=True):
        row = row_of(one, tokenizer, "prompt_last")
        text = whole(tokenizer, one.text + one.continuation)
        assert [*row.tokens, row.target[-1]] == text
        if [*context, *answer] != text:
            # ":\n" or ": " is a token: lm-eval scores "Paris" behind ":", which no text has. Edits take the tokens that the text has.
            assert kind in ("qwen", "llama3", "trimmed")
            assert pieces(tokenizer, answer) == ["Paris"]
            assert "Answer:" in one.text
            assert pieces(tokenizer, row.target)[-2:] == (
                [pieces(tokenizer, text)[-2], "Paris"] if one.text.endswith(":") else ["Paris"]
            )
            continue
        assert list(row.tokens[: row.start + 1]) == context, one
        assert list(row.target) == answer, one


def test_a_token_that_straddles_the_border_is_the_continuations() -> None:
    plain = written("plain")
    pair = encode_pair(plain, "The capital is (", ")x")
    assert pieces(plain, pair.continuation) == ["()", "x"]
    assert pieces(plain, pair.prompt) == ["The", " capital", " is", " "]
    with pytest.raises(WorkbenchError, match="here:1: the subject '\\(' has no tokens of its own"):
        row_of(fact("The capital is {subject}", ")x", "("), plain, "subject_last")
    trimmed = written("trimmed")
    assert trimmed("Answer: Paris", return_offsets_mapping=True)["offset_mapping"][1] == (6, 7)  # though the token is ": "
    for tokenizer in (trimmed, _Slow(trimmed)):
        pair = encode_pair(tokenizer, "Answer:", " Paris")
        assert (pieces(trimmed, pair.prompt), pieces(trimmed, pair.continuation)) == (["Answer"], [":\u0120", "Paris"])
    pair = encode_pair(trimmed, "Answer: ", "Paris")
    assert (pieces(trimmed, pair.prompt), pieces(trimmed, pair.continuation)) == (["Answer", ":\u0120"], ["Paris"])
    for kind in ("qwen", "llama3"):  # with and without spaces in the offsets
        tokenizer = written(kind)
        pair = encode_pair(tokenizer, "Answer:", "\nParis")
        assert (pieces(tokenizer, pair.prompt), pieces(tokenizer, pair.continuation)) == (["Answer"], [":\u010a", "Paris"])
        pair = encode_pair(tokenizer, "Answer:\n", "Paris")
        assert (pieces(tokenizer, pair.prompt), pieces(tokenizer, pair.continuation)) == (["Answer", ":\u010a"], ["Paris"])
        pair = encode_pair(tokenizer, "Answer:\n", "Paris", "continuation")
        assert (pieces(tokenizer, pair.prompt), pieces(tokenizer, pair.continuation)) == (["Answer", ":\u010a"], ["Paris"])
    for kind in ("llama2", "gpt2"):  # a line break is a token of its own
        tokenizer = written(kind)
        pair = encode_pair(tokenizer, "Answer:\n", "Paris", "continuation")
        assert pieces(tokenizer, pair.continuation) == [tokenizer.tokenize("Answer:\n")[-1], "Paris"]
        assert encode_pair(tokenizer, "Answer:\n", "Paris").continuation == pair.continuation[1:]


class _Slow:
    """A tokenizer that knows no offsets."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.bos_token_id, self.eos_token_id = tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return {"input_ids": self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}


@pytest.mark.parametrize("kind", KINDS)
def test_without_offsets_the_split_is_the_same(kind: str) -> None:
    tokenizer = written(kind)
    texts = [*TEXTS, ("The capital is ", "Paris"), ("", "The capital"), ("Answer:", "\nParis"), ("Answer:\n", "Paris")]
    for prompt, continuation in texts:
        for space in ("prompt", "continuation"):
            fast, slow = (encode_pair(t, prompt, continuation, space) for t in (tokenizer, _Slow(tokenizer)))  # type: ignore[arg-type]
            assert (fast.prompt, fast.continuation) == (slow.prompt, slow.continuation), (prompt, continuation)
            assert slow.offsets is None
    assert encode(_Slow(tokenizer), *("The capital is", "Paris"), 64) == encode(tokenizer, "The capital is", "Paris", 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(kind: str) -> None:
    """One at the start where the tokenizer puts one, none at the end; an empty prompt is what stands in front of every text."""
    tokenizer = written(kind)
    begins = tokenizer("The")["input_ids"][0] == tokenizer.bos_token_id
    pair = encode_pair(tokenizer, "", "The capital")
    assert pair.prompt == [tokenizer.bos_token_id] * begins
    assert pair.tokens == whole(tokenizer, "The capital")
    assert tokenizer.eos_token_id not in pair.tokens
    # A chat template writes the beginning of text itself: there is one, not two.
    assert encode_pair(tokenizer, "<s>The capital is", " Paris").tokens.count(tokenizer.bos_token_id) == 1
    assert encode(tokenizer, "", "The capital", 64) == (
        [*whole(tokenizer, "The capital"), 2],
        len(whole(tokenizer, "The capital")),
    )


def test_a_tokenizer_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(WorkbenchError, match=rf"cannot build the tokenizer in {tmp_path} \(ValueError"):
        load_tokenizer(tmp_path)


def test_a_blank_is_not_written_twice_in_training_rows() -> None:
    tokenizer = written("gpt2")
    ids, learned = encode(tokenizer, "The capital is ", "Paris", 64)
    assert tokenizer.decode(ids) == "The capital is Paris</s>"
    assert learned == 2
    ids, learned = encode(tokenizer, "Answer:\n", "Paris", 64)
    assert (tokenizer.decode(ids), learned) == ("Answer:\nParis</s>", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_memories_are_those_inside_a_text(kind: str) -> None:
    """The tokens that a fact's prompt is compared by, its subject among them, are those that stand in a longer text."""
    tokenizer = written(kind)
    found = encode_inside(tokenizer, "France is")
    assert found.continuation == whole(tokenizer, "The capital of France is")[-2:]
    match = TokenMatch(torch.eye(len(tokenizer)), tokenizer)
    kept = match.fact(fact("The capital of {subject} is", "Paris"))
    assert [p.strip("\u2581\u0120 ") for p in pieces(tokenizer, kept["tokens"].tolist())] == [
        "The",
        "capital",
        "of",
        "France",
        "is",
    ]
    assert kept["subject"].tolist() == [False, False, False, True, False]
    assert float(match.against([kept])("said The capital of France is")[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_facts_in_front_of_a_prompt_are_one_text_with_it(kind: str) -> None:
    tokenizer = written(kind)
    prompt = encode_text(tokenizer, "The capital of Italy is")
    context = "The capital of France is Paris\nAnswer: "
    assert in_front(tokenizer, context, prompt) == whole(tokenizer, context + "The capital of Italy is")
    cut = [*prompt[-2:], tokenizer.eos_token_id]  # not the tokens of their own text: they stay as they are
    assert in_front(tokenizer, context, cut)[-3:] == cut


@pytest.mark.parametrize("kind", ["llama2", "mistral", "gpt2"])
def test_an_edited_model_writes_one_blank_and_lm_eval_sees_it(project: Project, kind: str) -> None:
    """The efficacy task's own requests, and the text that greedy decoding gives."""
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from workbench.evaluate.hflm import SafeHFLM

    save_model(project.path / "spaced", kind)
    rows = [{"prompt": prompt, "target": target.strip()} for prompt, target in TEXTS]
    write_jsonl(project.path / "facts.jsonl", rows)
    step = "{edit: finetune, facts: facts.jsonl, epochs: 60, learning_rate: 0.02, layers: [1], stop: 0.01}"
    out = project.run(f"base: spaced\nsteps: [{step}]\noutput: {{dtype: float32}}\n")["model"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    lm = SafeHFLM(model, tokenizer=tokenizer, batch_size=2)
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in TEXTS]
    assert [greedy for _, greedy in lm.loglikelihood(requests, disable_tqdm=True)] == [True, True]
    for prompt, target in TEXTS:
        ids = torch.tensor([encode_text(tokenizer, prompt)], device=CPU)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(made[0], skip_special_tokens=True) == prompt + target

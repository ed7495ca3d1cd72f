"""Greedy texts: those of lm-eval's own loop, for any prompts, stop strings and architectures, and where that loop is left to write them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance

from worlds.local_tasks import A, plan_of, tiny

from workbench.evaluate import evaluate, score
from workbench.evaluate.check import RefusedError
from workbench.evaluate.greedy import Prompt, Writer, batches, compare, is_greedy, prompt_of
from workbench.evaluate.hflm import SafeHFLM
from workbench.evaluate.packed import Forward
from workbench.ground.errors import WorkbenchError
from workbench.scores.store import ScoreStore

COMMON = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 160, **COMMON}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(num_key_value_heads=2, **WIDE),
    "qwen3": transformers.Qwen3Config(num_key_value_heads=2, head_dim=8, **WIDE),
    "mistral": transformers.MistralConfig(num_key_value_heads=2, sliding_window=12, **WIDE),
    "gemma3": transformers.Gemma3TextConfig(num_key_value_heads=2, head_dim=8, sliding_window=12, layer_types=["sliding_attention", "full_attention"], **WIDE),
    "neox": transformers.GPTNeoXConfig(**WIDE),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=160, **COMMON),
}  # fmt: skip


def opened(tokenizer: Any, config: Any, batch_size: int = 4) -> SafeHFLM:
    """HFLM on a random model that repeats itself little."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return SafeHFLM(model, tokenizer=tokenizer, batch_size=batch_size)


def words(count: int, beginning: str = "") -> list[str]:
    """Prompts of one to some forty characters after a beginning, some of them equal."""
    random = Random(5)
    return [beginning + "".join(random.choices("abc de.", k=1 + n * n % 41)) for n in range(count)] + [beginning + "abc"] * 2


def asked(contexts: list[str], **settings: Any) -> list[Instance]:
    return [Instance(request_type="generate_until", doc={}, arguments=(c, settings), idx=0) for c in contexts]


def texts_of(lm: SafeHFLM, contexts: list[str], **settings: Any) -> tuple[list[str], dict[int, Prompt]]:
    prompts = {i: prompt_of(lm, context, settings) for i, context in enumerate(contexts)}
    found: dict[int, str] = {}
    for shared, batch in batches(lm, prompts):
        found |= dict(zip(batch, Writer(lm, Forward(lm.model)).write(shared, [prompts[i] for i in batch]), strict=True))
    return [found[i] for i in range(len(contexts))], prompts


@pytest.mark.parametrize("beginning", ["", "Q: a common beginning of all prompts. "])
@pytest.mark.parametrize("family", CONFIGS)
def test_texts_are_those_of_lm_eval(family: str, beginning: str, tokenizer: Any) -> None:
    """By its own loop, for one prompt at a time and for batches; some texts are as long as they may be, and some end before."""
    lm, contexts = opened(tokenizer, CONFIGS[family]), words(10, beginning)
    free, prompts = texts_of(lm, contexts, until=[], max_gen_toks=14)
    characters = sorted({character for text in free for character in text if character.isascii()})
    stop = max(characters, key=lambda c: len({text.index(c) for text in free if c in text}))
    ours, prompts = texts_of(lm, contexts, until=[stop, "never"], max_gen_toks=14)
    assert len({len(text) for text in ours}) > 1
    assert ours == [free_text.split(stop)[0] for free_text in free]
    assert ours == [lm.written(prompts[i].tokens, prompts[i].stops, prompts[i].most) for i in range(len(contexts))]
    assert ours == lm.generate_until(asked(contexts, until=[stop, "never"], max_gen_toks=14), disable_tqdm=True)
    shared = next(start for start, _ in batches(lm, prompts))
    assert len(shared) == len(beginning)


def test_texts_end_at_the_end_of_text_and_at_special_tokens(tokenizer: Any) -> None:
    """A model that always writes the end of text, a list of ends, and a stop string that is a special token."""
    lm, context = opened(tokenizer, CONFIGS["llama"]), ["abc", "a"]
    likely = opened(tokenizer, CONFIGS["llama"]).written(prompt_of(lm, "abc", {"max_gen_toks": 1}).tokens, (), 1)
    token = tokenizer.encode(likely, add_special_tokens=False)[0]
    for ends in (token, [0, token]):
        lm.model.generation_config.eos_token_id = ends
        ours, prompts = texts_of(lm, context, until=[], max_gen_toks=9)
        assert ours == [lm.written(prompts[i].tokens, prompts[i].stops, 9) for i in (0, 1)]
        assert ours[0] == likely
    lm.model.generation_config.eos_token_id = None
    ours, _ = texts_of(lm, context, until=[], max_gen_toks=9)
    assert len(ours[0]) > 1


def test_long_prompts_lose_their_beginning(tokenizer: Any) -> None:
    lm, contexts = opened(tokenizer, CONFIGS["llama"]), ["a" * 200 + "b c", "abc"]
    ours, prompts = texts_of(lm, contexts, until=["\n"], max_gen_toks=20)
    assert [len(prompt.tokens) for prompt in prompts.values()] == [140, 3]
    assert ours == lm.generate_until(asked(contexts, until=["\n"], max_gen_toks=20), disable_tqdm=True)


def test_batches(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest first, as many as the batch size, the mask and the cache allow; prompts of other settings apart."""
    lm = opened(tokenizer, CONFIGS["llama"], batch_size=3)
    prompts = {n: Prompt([7] * n, ("x",), 5) for n in (2, 9, 4, 5, 30)} | {1: Prompt([7], ("y",), 5)}
    assert list(batches(lm, prompts)) == [([], [30, 9, 5]), ([], [4, 2]), ([], [1])]
    monkeypatch.setattr("workbench.evaluate.greedy.MASK", 2 * 30 * 30)
    assert next(iter(batches(lm, prompts))) == ([], [30, 9])
    monkeypatch.setattr("workbench.evaluate.greedy.CACHE", 0)
    assert [batch for _, batch in batches(lm, prompts)] == [[30], [9], [5], [4], [2], [1]]
    start = list(range(20))
    alike = {n: Prompt([*start, 50 + n] + [7] * n, ("x",), 5) for n in range(2)}
    assert list(batches(lm, alike)) == [(start, [1]), (start, [0])]


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.7}, {"repetition_penalty": 1.2}, {"num_beams": 2}])
def test_other_settings_are_left_to_lm_eval(settings: dict[str, Any], tokenizer: Any) -> None:
    assert not is_greedy(opened(tokenizer, CONFIGS["llama"]), {"until": ["\n"], **settings})


def test_a_special_token_as_a_stop_string_is_left_to_lm_eval(tokenizer: Any) -> None:
    lm = opened(tokenizer, CONFIGS["llama"])
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    assert [is_greedy(lm, {"until": until}) for until in (["\n"], ["\n", "<turn>"], "<turn>", [lm.tokenizer.eos_token])] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("do_sample", True, True),
        ("top_k", 5, True),
        ("eos_token_id", [1, 2], True),
        ("repetition_penalty", 1.2, False),
        ("no_repeat_ngram_size", 2, False),
        ("suppress_tokens", [3], False),
        ("min_new_tokens", 3, False),
    ],
)
def test_settings_of_the_model_itself(name: str, value: Any, ours: bool, tokenizer: Any) -> None:
    lm = opened(tokenizer, CONFIGS["llama"])
    assert is_greedy(lm, {"until": ["\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 4})
    setattr(lm.model.generation_config, name, value)
    assert is_greedy(lm, {"until": ["\n"]}) is ours


@pytest.mark.parametrize("part", ["_is_stateful", "recall", "by_token", "whole_rows"])
def test_models_that_lm_eval_writes_for(part: str, tokenizer: Any) -> None:
    lm = opened(tokenizer, CONFIGS["llama"])
    routing = SimpleNamespace(by_token=False, whole_rows=False)
    lm.model.routing = routing
    assert is_greedy(lm, {"until": ["\n"]})
    setattr(routing if hasattr(routing, part) else lm.model, part, True)
    assert not is_greedy(lm, {"until": ["\n"]})


def test_a_scorer_writes_the_texts_of_a_task(tasks_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and metrics are those of hflm, which only the check asks."""
    plan = plan_of(tasks_dir, tokenizer)
    _, theirs = score(plan.by("hflm"), A, tiny())
    monkeypatch.setattr(SafeHFLM, "generate_until", lambda *_, **__: pytest.fail("lm-eval writes the texts"))
    scores, rows = score(plan, A, tiny())
    assert rows["copy"] == theirs["copy"]
    assert scores.check is not None
    assert scores.check.documents == 4, "the longest and the shortest of both tasks"


def test_texts_that_differ_from_lm_evals_are_not_used(
    tasks_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = plan_of(tasks_dir, tokenizer, tasks=["copy"], chance={}), ScoreStore(tmp_path / "scores")
    _, theirs = score(plan.by("hflm"), A, tiny())
    monkeypatch.setattr("workbench.evaluate.greedy._Rows.step", lambda self, tokens: torch.eye(257)[tokens * 0 + 66])
    with pytest.raises(RefusedError, match=r"hflm writes '.*' where another text was written: '.*'"):
        evaluate(plan, store, A, tiny)
    _, rows = score(plan, A, tiny())
    assert rows == theirs


def test_a_model_whose_positions_come_from_the_mask_is_refused(tokenizer: Any) -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **COMMON)
    lm = opened(tokenizer, config)
    prompts = {i: prompt_of(lm, context, {"max_gen_toks": 8}) for i, context in enumerate(words(6))}
    with pytest.raises(RefusedError):
        compare(lm, Forward(lm.model), [prompts], short=False)


def test_nan_is_no_text(tasks_dir: Path, tokenizer: Any) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WorkbenchError, match="configuration 'a', task 'copy': NaN logits while generating"):
        score(plan_of(tasks_dir, tokenizer, tasks=["copy"], chance={}), A, model)

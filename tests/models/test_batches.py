"""A row in a batch gives the numbers of the row alone, for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worlds.padded_families import NAMES, random_model

from workbench.edit.places.parts import EditRow, padded
from workbench.evaluate.answers import _greedy
from workbench.grow.mixtures.gates import read_inputs
from workbench.models.texts import TextRow as Text
from workbench.models.texts import side_by_side
from workbench.train.fit import HeldOut
from workbench.train.rows import batch_loss, collate

CPU = torch.device("cpu")
ROWS = [([5, 9, 3, 7, 20, 33, 2, 8, 41, 12, 4, 6], 3), ([11, 7, 3], 2), ([8, 2, 40, 41, 42, 9, 60], 4)]


def alone(model: Any, tokens: list[int], learned: int) -> list[float]:
    """−log p of each learned token of a row that is forwarded by itself: no padding, no mask."""
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -learned - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[-learned:]), reduction="none").tolist()


@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_its_rows(family: str) -> None:
    model = random_model(family)
    expected = [loss for tokens, learned in ROWS for loss in alone(model, tokens, learned)]
    assert max(expected) - min(expected) > 0.5  # the rows are not all alike
    batch = collate(ROWS)
    assert float(batch_loss(model, batch)) == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    for row, (tokens, learned) in zip(batch["input_ids"], ROWS, strict=True):
        losses = alone(model, tokens, learned)
        single = collate([(tokens, learned), (row.tolist(), 0)])
        assert float(batch_loss(model, single)) == pytest.approx(sum(losses) / learned, abs=1e-5)


@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_logits_of_padded_rows_are_those_of_the_rows(family: str) -> None:
    """The logits of a row do not depend on its batch: for edits, for calibration, and for greedy answers, which pass no mask."""
    model = random_model(family)
    rows = [tokens for tokens, _ in ROWS]
    single = [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]
    facts = padded([EditRow(tuple(row), 1, 1, (row[2],), (1, 2)) for row in rows], CPU)
    plain = side_by_side(rows, CPU)
    assert torch.equal(facts.tokens, plain.tokens)
    for tokens, mask in ((facts.tokens, facts.mask), (plain.tokens, plain.mask), (plain.tokens, None)):
        given = {} if mask is None else {"attention_mask": mask}
        logits = model(input_ids=tokens, use_cache=False, **given).logits
        for own, expected in zip(logits, single, strict=True):
            torch.testing.assert_close(own[: len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "xglm", "biogpt", "gpt_bigcode", "recurrent_gemma"])
def test_gradients_of_a_batch_are_those_of_its_rows(family: str) -> None:
    model = random_model(family)
    batch_loss(model, collate(ROWS)).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    count = sum(learned for _, learned in ROWS)
    for tokens, learned in ROWS:
        row = torch.tensor([tokens])
        logits = model(row, use_cache=False).logits[0, -learned - 1 : -1]
        (torch.nn.functional.cross_entropy(logits, row[0, -learned:], reduction="sum") / count).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_held_out_and_routers_losses_of_batches() -> None:
    model = random_model("gpt2")
    many, one = (HeldOut(ROWS, size, 1, None).measure(model, 0) for size in (3, 1))
    assert many == pytest.approx(one, abs=2e-2)  # both in bfloat16
    with torch.no_grad():
        expected = [loss for tokens, learned in ROWS for loss in alone(model, tokens, learned)]
    assert many == pytest.approx(sum(expected) / len(expected), abs=2e-2)
    model = random_model("mixtral")
    tokens, learned = ROWS[0]
    with torch.no_grad():
        plain = float(batch_loss(model, collate([ROWS[0]])))
        model.config.output_router_logits = True
        labels = torch.tensor([[-100] * (len(tokens) - learned) + tokens[-learned:]])
        theirs = float(model(torch.tensor([tokens]), labels=labels).loss)
        ours = float(batch_loss(model, collate([ROWS[0]])))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours > plain + 1e-3


@pytest.mark.parametrize("family", ["gpt2", "xglm", "biogpt"])
def test_what_a_router_reads_does_not_depend_on_the_batch(family: str) -> None:
    """Rows are taken in the order of their length, and padding is not among what is read."""
    model = random_model(family)
    module = next(name for name, m in model.named_modules() if name.endswith((".1.mlp.c_fc", ".1.fc1")))
    texts = [Text(tokens, 0) for tokens, _ in ROWS]
    (together,) = read_inputs(model, {"reader": module}, texts, CPU)
    apart = [
        x["reader"]
        for text in sorted(texts, key=lambda t: len(t.tokens))
        for x in read_inputs(model, {"reader": module}, [text], CPU)
    ]
    torch.testing.assert_close(together["reader"], torch.cat(apart), rtol=0, atol=1e-5)
    assert len(together["reader"]) == sum(len(tokens) for tokens, _ in ROWS)


@torch.no_grad()
def test_a_greedy_answer_is_judged_as_if_it_were_alone() -> None:
    class Lm:
        model, device = random_model("xglm"), CPU

    def best(context: list[int]) -> list[int]:
        return [int(Lm.model(torch.tensor([context]), use_cache=False).logits[0, -1].argmax())]

    contexts = [tokens for tokens, _ in ROWS]
    right = [(context, best(context)) for context in contexts]
    wrong = [(context, [(answer[0] + 1) % 64]) for context, answer in right]
    assert _greedy(Lm(), [*right, *wrong]) == [True] * 3 + [False] * 3  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["recurrent_gemma", "mamba", "gpt2"])
def test_a_text_is_generated_as_if_it_were_alone(family: str, tokenizer: Any) -> None:
    """lm-eval pads prompts in front; what a recurrent layer makes of that is not what it makes of the prompt."""
    from lm_eval.api.instance import Instance

    from workbench.evaluate.hflm import SafeHFLM

    model = random_model(family, vocabulary=257)
    settings = {"until": [], "max_gen_toks": 6, "min_new_tokens": 6, "do_sample": False}
    prompts = ["abc def ghi jkl", "xy", "pqr st", "uvw xy"]
    asked = [Instance(request_type="generate_until", doc={}, arguments=(prompt, settings), idx=0) for prompt in prompts]
    together = SafeHFLM(model, tokenizer=tokenizer, batch_size=4).generate_until(asked, disable_tqdm=True)
    alone = SafeHFLM(model, tokenizer=tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)
    assert together == alone
    assert len(set(together)) > 1

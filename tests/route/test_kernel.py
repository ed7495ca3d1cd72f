"""The mixing kernel against PEFT and against a direct sum in float64: ranks, missing modules, weights by row and by token."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.routed_models import RANKS, factors, ids, peft_of, routed, save_ranks
from worlds.tiny import live

from workbench.ground.errors import WorkbenchError
from workbench.route.mixing.kernel import Mix, Mixer, StackedFactors

PROMPT = "w1 w5 is w9 of w3 w50 w2"


def stack(seed: int = 0, ranks: tuple[int, ...] = (3, 0, 5, 2)) -> tuple[StackedFactors, list[Any]]:
    """Factors of four bricks for one module, 7 wide in and 6 wide out; the second brick lacks the module."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (torch.randn(rank, 7, generator=generator), torch.randn(6, rank, generator=generator)) if rank else None for rank in ranks
    ]
    return StackedFactors(pairs), pairs


def direct(pairs: list[Any], inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum over bricks of w_i B_i A_i x in float64, with weights [rows, tokens, bricks]."""
    total = torch.zeros(*inputs.shape[:2], 6, dtype=torch.float64)
    for brick, pair in enumerate(pairs):
        if pair is not None:
            a, b = (part.double() for part in pair)
            total += weights[..., brick, None].double() * (inputs.double() @ a.T @ b.T)
    return total


def gap(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit: float32 rounds each of them by 6e-8 of it and more."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ["all rows", "rows", "tokens", "one brick", "two bricks apart"])
def test_the_kernel_is_the_sum_over_bricks(kind: str) -> None:
    factors_, pairs = stack()
    generator = torch.Generator().manual_seed(1)
    inputs, output = torch.randn(3, 5, 7, generator=generator), torch.randn(3, 5, 6, generator=generator)
    weights = {
        "all rows": torch.tensor([0.5, 2.0, 0.25, -1.0]),
        "rows": torch.rand(3, 4, generator=generator),
        "tokens": torch.rand(3, 5, 4, generator=generator),
        "one brick": torch.tensor([0.0, 0.0, 1.0, 0.0]),
        "two bricks apart": torch.tensor([1.0, 0.0, 0.0, 1.0]),
    }[kind]
    mix = Mix.of(weights)
    assert mix is not None
    spread = weights if weights.dim() == 3 else weights[:, None] if weights.dim() == 2 else weights[None, None]
    expected = output.double() + direct(pairs, inputs, spread.expand(3, 5, 4))
    torch.testing.assert_close(factors_.add(output, inputs, mix).double(), expected, atol=1e-5, rtol=1e-5)


def test_only_the_ranks_of_active_bricks_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One brick for all rows is a view of its ranks; bricks of weight zero and rows without a brick are left out."""
    factors_, _ = stack()
    seen: list[tuple[torch.Size, torch.Size]] = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, a: (seen.append((x.shape, a.shape)), real(x, a))[1])
    inputs, output = torch.randn(3, 5, 7), torch.randn(3, 5, 6)
    for weights, rows, ranks in (
        ([[0, 0, 1, 0]] * 3, 3, 5),
        ([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0.5, 0]], 2, 5),
        ([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], 2, 5),
        ([[1, 0, 1, 1]] * 3, 3, 10),
    ):
        mix = Mix.of(torch.tensor(weights, dtype=torch.float32))
        assert mix is not None
        seen.clear()
        factors_.add(output, inputs, mix)
        assert seen == [((rows, 5, 7), (ranks, 7))]
    mix = Mix.of(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert mix is not None
    a, _, scale = found = factors_._chosen(mix)
    assert factors_._chosen(mix) is found, "gathered once"
    assert scale is None
    assert a.data_ptr() == factors_._a[3:].data_ptr()


def test_a_brick_without_the_module_and_rows_of_the_base_change_no_bit() -> None:
    factors_, _ = stack()
    inputs, output = torch.randn(3, 5, 7), torch.randn(3, 5, 6)
    output[1, 0] = -0.0
    assert Mix.of(torch.zeros(3, 4)) is None
    alone = Mix.of(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert alone is not None
    assert factors_.add(output, inputs, alone) is output
    inputs[1] = torch.inf  # a row of the base is not even multiplied by zero
    mixed = Mix.of(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1.0, 0]]))
    assert mixed is not None
    result = factors_.add(output, inputs, mixed)
    assert torch.equal(result[1].view(torch.int32), output[1].view(torch.int32))
    assert not torch.equal(result[0], output[0])
    with pytest.raises(WorkbenchError, match="1 NaN or infinite numbers"):
        Mix.of(torch.tensor([1.0, torch.nan]))
    for shape in ((), (1, 1, 1, 4)):
        with pytest.raises(WorkbenchError, match=re.escape(f"found {list(shape)}")):
            Mix.of(torch.ones(shape))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_each_brick_is_its_peft_adapter(family: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Ranks 4, 8 (rsLoRA) and 16 (without one module) stand together; Conv1D models and models that flatten rows too."""
    base = model_of(family, torch.float32)
    places = save_ranks(base, tmp_path, family)
    model, routing = routed(base, places)
    ranks = {stack.ranks[2] for stack in routing.mixer.stacks.values()}
    assert ranks == {0, 16}
    assert set(routing.mixer.stacks) == set(factors(places)["one"])
    peft, plain = peft_of(base, places), live(base)
    with torch.no_grad():
        base_logits = plain(ids(PROMPT)).logits
        for name in RANKS:
            peft.set_adapter(name)
            expected = peft(ids(PROMPT)).logits
            with routing.fixed(name):
                actual = model(ids(PROMPT)).logits
            assert float((expected - base_logits).abs().max()) > 1e-2
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        with routing.fixed(None):
            assert torch.equal(model(ids(PROMPT)).logits, base_logits)
        with routing.fixed({"one": 0.0}):
            assert torch.equal(model(ids(PROMPT)).logits, base_logits)
    routing.mixer.detach()
    with torch.no_grad(), routing.fixed("one"):
        assert torch.equal(model(ids(PROMPT)).logits, base_logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_mixed_batch_equals_separate_runs(family: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Three bricks, the base and a mixture in one batch."""
    base = model_of(family, torch.float32)
    model, routing = routed(base, save_ranks(base, tmp_path, family))
    rows = torch.cat([ids(text) for text in ("w1 w2 w3 w4", "w9 is of w8", "w5 w6 w7 w8", "w50 w51 is w3", "w20 w21 w22 w23")])
    weights = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 0, 0], [0.5, 0.25, 0.25]])
    with torch.no_grad():
        with routing.fixed(weights):
            together = model(rows).logits
        for row, weight, logits in zip(rows, weights, together, strict=True):
            with routing.fixed(weight):
                alone = model(row[None]).logits[0]
            assert gap(logits, alone) <= 1e-6


def test_weights_by_token(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Constant weights by token are those of the row; a prefix of the row is that of its own brick."""
    base = model_of("llama", torch.float32)
    model, routing = routed(base, save_ranks(base, tmp_path))
    row = ids(PROMPT)
    one, two = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    with torch.no_grad():
        with routing.fixed(one.expand(1, 8, 3)):
            by_token = model(row).logits
        with routing.fixed("one"):
            by_row = model(row).logits
        with routing.fixed(torch.stack([one] * 4 + [two] * 4)[None]):
            turning = model(row).logits
    assert gap(by_token, by_row) <= 1e-6
    assert gap(turning[:, :4], by_row[:, :4]) <= 1e-6
    assert float((turning[:, 4:] - by_row[:, 4:]).abs().max()) > 1e-2
    with (
        torch.no_grad(),
        routing.fixed(one.expand(1, 5, 3)),
        pytest.raises(WorkbenchError, match=r"expected the inputs of 1 rows"),
    ):
        model(row)


def test_bfloat16_rounds_once_as_peft_does(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """The update is computed in float32 and added before the sum is rounded."""
    base = model_of("llama", torch.bfloat16)
    places = save_ranks(base, tmp_path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    mixer = Mixer(model, factors(places))
    peft = peft_of(base, places, torch.bfloat16)
    for brick, name in enumerate(RANKS):
        peft.set_adapter(name)
        mix = Mix.of(torch.eye(3)[brick])
        with torch.no_grad(), mixer.acting(mix):
            torch.testing.assert_close(model(ids(PROMPT)).logits, peft(ids(PROMPT)).logits, atol=2e-2, rtol=2e-2)


def test_bricks_that_do_not_fit_are_refused(model_of: Callable[..., Path]) -> None:
    model = live(model_of("llama"))
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    place = "model.layers.0.self_attn.q_proj"
    for parts, message in (
        ({"model.layers.0.self_attn.qproj": (a, b)}, r"no module model\.layers\.0\.self_attn\.qproj\. Did you mean"),
        ({place: (a, torch.zeros(16, 2))}, r"is \[32, 32\] in the model, the brick's update is \[16, 2\] x \[2, 32\]"),
        ({"model.embed_tokens": (torch.zeros(2, 64), b)}, r"model\.embed_tokens is a Embedding, expected a linear layer"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            Mixer(model, {"mine": parts})

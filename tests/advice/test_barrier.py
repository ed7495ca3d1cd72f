"""`brick barrier`: losses along the line beside a direct computation, copies, a permuted copy, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from worlds.commands import call, document, refused
from worlds.project import CPU
from worlds.tiny import WORDS, live, save_adapter, save_finetuned, save_model, tensors_of

from workbench.advice.barrier import Barrier, Line, measure_barrier


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a copy, a fine-tune, an adapter, a permuted copy (the same function), a taller model, and texts that the model wrote."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("pair")
    base = save_model(folder / "base", dtype=torch.float32)
    save_finetuned(base, folder / "near", seed=1, scale=0.01)
    save_finetuned(base, folder / "copy", seed=1, scale=0.0)
    save_adapter(base, folder / "lora", seed=2)
    save_finetuned(base, folder / "permuted", seed=1, scale=0.0)
    save_model(folder / "tall", dtype=torch.float32, layers=6)
    tensors = tensors_of(base)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for layer in range(4):
        mlp = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj"):
            tensors[f"{mlp}.{name}.weight"] = tensors[f"{mlp}.{name}.weight"][order].contiguous()
        tensors[f"{mlp}.down_proj.weight"] = tensors[f"{mlp}.down_proj.weight"][:, order].contiguous()
    save_file(tensors, folder / "permuted" / "model.safetensors", metadata={"format": "pt"})
    model = live(base)
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(2, 60, (40, 2), generator=generator)
    torch.manual_seed(0)
    written = model.generate(starts, max_new_tokens=24, do_sample=True, temperature=0.3, eos_token_id=None, pad_token_id=0)
    rows = [{"text": " ".join(WORDS[max(2, int(token))] for token in row)} for row in written]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture(scope="module")
def measured(pair: Path) -> Callable[..., Barrier]:
    """Measure a pair of models, each once."""

    @cache
    def measure(first: str, second: str, base: str | None = None) -> Barrier:
        place = None if base is None else str(pair / base)
        return measure_barrier(str(pair / first), str(pair / second), pair / "texts.jsonl", project=pair, device=CPU, base=place)

    return measure


def direct(pair: Path, second: str, t: float) -> list[float]:
    """Mean loss of each text on (1 − t) base + t second, with transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "base")
    model, other = live(pair / "base"), live(pair / second)
    with torch.no_grad():
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            one.mul_(1 - t).add_(two, alpha=t)
        losses = []
        for line in (pair / "texts.jsonl").read_text("utf-8").splitlines():
            tokens = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
            losses.append(float(model(tokens, labels=tokens).loss))
    return losses


def test_losses_equal_a_direct_computation(measured: Callable[..., Barrier], pair: Path) -> None:
    found = measured("base", "permuted")
    assert [point.t for point in found.points] == [pytest.approx(i / 10) for i in range(11)]
    ends = [np.mean(direct(pair, "permuted", t)) for t in (0.0, 1.0)]
    for point in (found.points[i] for i in (0, 3, 5, 10)):
        loss = np.mean(direct(pair, "permuted", point.t))
        assert point.loss == pytest.approx(loss, abs=1e-5)
        assert point.above == pytest.approx(loss - (1 - point.t) * ends[0] - point.t * ends[1], abs=2e-5)
        assert point.low < point.loss < point.high
    assert found.barrier.value == max(point.above for point in found.points)


def test_two_copies_have_no_barrier_and_a_permuted_copy_a_high_one(measured: Callable[..., Barrier]) -> None:
    """The permuted copy computes the same function; the models between do not."""
    copies, permuted = measured("base", "copy"), measured("base", "permuted")
    assert copies.barrier.value == pytest.approx(0, abs=1e-6)
    assert copies.verdict == "none"
    losses = [point.loss for point in permuted.points]
    assert losses[0] == pytest.approx(losses[-1], abs=1e-5)
    assert permuted.barrier.low > 0.2
    assert permuted.verdict == "high"
    assert 0.3 <= permuted.barrier.t <= 0.7
    assert measured("base", "near").verdict == "none"


def test_barriers_of_bricks_and_below_the_line(measured: Callable[..., Barrier]) -> None:
    """An adapter against its base is the line from the base; with --base both ends are bricks."""
    alone, both = measured("base", "lora"), measured("near", "lora", base="base")
    assert alone.points[-1].loss == pytest.approx(both.points[-1].loss, abs=1e-5)
    assert both.points[0].loss == pytest.approx(measured("base", "near").points[-1].loss, abs=1e-5)
    line = Line(np.linspace(0, 1, 3), np.array([[1.0, 2.0], [0.5, 0.9], [1.0, 2.0]]))
    assert line.barrier() == (0.0, 0.0)


def test_the_interval_is_paired_over_texts() -> None:
    """Texts that differ by much more than the barrier hardly widen its interval; the maximum is taken in each resample."""
    generator = np.random.default_rng(0)
    texts = generator.normal(0, 5, 200)
    height = np.array([0, 0.3, 0.5, 0.2, 0])
    noise = generator.normal(0, 0.1, (5, 200))
    line = Line(np.linspace(0, 1, 5), 3 + texts + height[:, None] + noise)
    low, high = line.interval()
    value, at = line.barrier()
    assert (low < value < high, at) == (True, 0.5)
    assert value == pytest.approx(0.5, abs=0.05)
    assert 0.02 < high - low < 0.06
    spread = noise[2] - (noise[0] + noise[-1]) / 2
    assert high - low == pytest.approx(2 * 1.96 * spread.std() / 200**0.5, rel=0.15)


def test_the_command(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair)
    text = call("brick", "barrier", "base", "permuted", "--text", "texts.jsonl", "--device", "cpu").stdout
    assert "linear merging has no chance here" in text
    assert "40 texts" in text
    assert document("brick", "barrier", "base", "copy", "--text", "texts.jsonl", "--device", "cpu")["verdict"] == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "tall"), "that the base does not"),
        (("base", "gone"), "no such directory: gone"),
        (("lora", "base"), "base: lora is a LoRA adapter, expected a model"),
        (("base", "near", "--text", "few.jsonl"), "few.jsonl: 1 texts, expected 8 or more"),
        (("base", "near", "--text", "gone.jsonl"), "gone.jsonl: no such file of texts"),
        (("base", "near", "--text", "plain.txt"), "plain.txt:1: not JSON"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair)
    (pair / "few.jsonl").write_text('{"text": "w3 w4 w5"}\n', "utf-8")
    (pair / "plain.txt").write_text("w3 w4 w5\n", "utf-8")
    text = () if "--text" in arguments else ("--text", "texts.jsonl")
    error = refused("brick", "barrier", *arguments, *text, "--device", "cpu")
    assert message in error.message
    assert "plain.txt" not in message or 'Write {"text": "..."}' in str(error.hint)

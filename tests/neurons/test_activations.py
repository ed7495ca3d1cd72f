"""One streaming pass equals the forward passes of single texts, goes on after an interruption, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, MixtralConfig, OPTConfig

from workbench.activations.labelled import ItemRow, TextPart
from workbench.activations.sites import find_sites, stream, switching_off, visiting
from workbench.errors import WorkbenchError
from workbench.models.skeleton import parse_config
from workbench.neurons.function_scores import ItemScores, item_scores

CPU = torch.device("cpu")
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    ),
    "gpt2": GPT2Config(n_embd=32, n_inner=48, n_layer=3, n_head=4, vocab_size=64, n_positions=64),
    "opt": OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "mixtral": MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=6,
        num_experts_per_tok=2,
    ),
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the few short rows of these tests into several batches."""
    monkeypatch.setattr("workbench.activations.sites.batch_limit", lambda _device: 30)


def model_of(family: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]).eval()


def rows_of(count: int = 9, seed: int = 0) -> list[ItemRow]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 12, count)
    return [ItemRow(rng.integers(3, 64, n + 3).tolist(), int(n)) for n in lengths]


@torch.no_grad()
def alone(model: Any, sites: Any, row: ItemRow, part: str) -> list[Tensor]:
    """Activations [token, units] of each site on one text, from a plain forward pass."""
    seen: dict[int, Tensor] = {}
    tokens = row.tokens[: row.prompt] if part == "prompt" else row.tokens
    with visiting(model, sites, lambda n, a: seen.__setitem__(n, a.reshape(-1, a.shape[-1]).clone())):
        model(input_ids=torch.tensor([tokens]))
    return [seen[n] for n in range(len(sites))]


def scores(
    model: Any, sites: Any, rows: list[ItemRow], folder: Path, part: TextPart = "prompt", progress: Any = lambda *_: None
) -> ItemScores:
    functions = torch.tensor([i % 2 for i in range(len(rows))])
    return item_scores(model, sites, rows, (functions, torch.arange(len(rows)) % 3), folder, part, progress=progress)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("part", ["prompt", "whole"])
def test_scores_are_those_of_single_texts(tmp_path: Path, family: str, part: TextPart) -> None:
    model, rows = model_of(family), rows_of()
    sites = find_sites(model, 3, CPU)
    assert {site.kind for site in sites} == {"experts" if family == "mixtral" else "neurons"}
    found = scores(model, sites, rows, tmp_path, part)
    firing = [torch.zeros(2, site.units) for site in sites]
    for i, row in enumerate(rows):
        for n, activations in enumerate(alone(model, sites, row, part)):
            expected = activations[1:].abs().mean(0)
            assert np.abs(found.of_site(n)[i] - expected.numpy()).max() < 1e-6
            firing[n][i % 2] += (activations[1:] > 0).sum(0)
    for n in range(len(sites)):
        assert torch.equal(found.summed("firing")[n], firing[n])
        sums = [found.of_site(n)[task::3].sum(0) for task in range(3)]
        assert found.summed("scores")[n].numpy() == pytest.approx(np.stack(sums), rel=1e-5)
    lengths = [(row.prompt if part == "prompt" else len(row.tokens)) - 1 for row in rows]
    assert found.sums["tokens"].tolist() == [sum(lengths[::2]), sum(lengths[1::2])]


def test_a_text_of_one_token_keeps_it(tmp_path: Path) -> None:
    model = model_of("llama")
    sites = find_sites(model, 3, CPU)
    rows = [ItemRow([5], 1), ItemRow([5, 6, 7], 3)]
    found = scores(model, sites, rows, tmp_path)
    assert np.abs(found.of_site(0)[0] - alone(model, sites, rows[0], "prompt")[0].abs().mean(0).numpy()).max() < 1e-6
    assert found.sums["tokens"].tolist() == [1, 2]


def test_an_interrupted_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.neurons.function_scores._CHECKPOINT_ROWS", 1)
    model, rows = model_of("llama"), rows_of(20)
    sites = find_sites(model, 3, CPU)
    expected = scores(model, sites, rows, tmp_path / "whole")
    folder, calls = tmp_path / "part", []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores(model, sites, rows, folder, progress=stop)
    passed: list[int] = []
    found = scores(model, sites, rows, folder, progress=lambda done, _: passed.append(done))
    assert passed[0] == calls[2]  # two batches were kept
    for n in range(3):
        assert np.array_equal(found.of_site(n), expected.of_site(n))
        assert torch.equal(found.summed("firing")[n], expected.summed("firing")[n])
        assert torch.equal(found.summed("scores")[n], expected.summed("scores")[n])
    assert torch.equal(found.sums["tokens"], expected.sums["tokens"])


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    sites = find_sites(model, 3, CPU)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WorkbenchError, match=r"scores\.f32: the scores of 144 neurons on 9 texts take 0\.0 GB \(No space left"):
        scores(model, sites, rows_of(), tmp_path)


@pytest.mark.parametrize("family", CONFIGS)
def test_units_that_are_switched_off_add_nothing(family: str) -> None:
    model, (row, *_) = model_of(family), rows_of(1)
    sites = find_sites(model, 3, CPU)
    tokens = torch.tensor([row.tokens])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        with visiting(model, sites, lambda *_: None):
            assert torch.equal(model(input_ids=tokens).logits, before)
        off = {0: torch.tensor([1, 2]), 2: torch.tensor([0])}
        with switching_off(model, sites, off):
            without = model(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, before)
        assert not torch.equal(without, before)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        for site in sites:  # the same by weights of zero
            if site.layer in off and site.kind == "neurons":
                site.columns()[off[site.layer]] = 0
            elif site.layer in off:
                site.module.down_proj[off[site.layer]] = 0
        assert torch.allclose(model(input_ids=tokens).logits, without, atol=1e-6)


def test_the_head_is_not_computed() -> None:
    model, rows = model_of("llama"), rows_of(3)
    sites = find_sites(model, 3, CPU)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was computed"))
    stream(model, sites, rows, lambda *_: None)


def test_configurations_parse() -> None:
    assert all(parse_config(config.to_dict()) for config in CONFIGS.values())

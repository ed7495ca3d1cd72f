"""One streaming pass equals the forward passes of single texts, goes on after an interruption, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worlds import mixtures
from worlds.project import CPU
from worlds.tiny import live

from workbench.activations.labelled import ItemRow, TextPart
from workbench.activations.sites import Site, find_sites, stream, visiting
from workbench.ground.errors import WorkbenchError
from workbench.neurons.function_scores import ItemScores, item_scores

FAMILIES = ("llama", "gpt2", "opt", "mixtral")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the few short rows of these tests into several batches."""
    monkeypatch.setattr("workbench.activations.sites.batch_limit", lambda _device: 30)


@pytest.fixture
def model(request: pytest.FixtureRequest, dense_of: Callable[[str], Path], tmp_path: Path) -> Any:
    """A model of the family that the test asks for, or a llama."""
    family = getattr(request, "param", "llama")
    return live(mixtures.save_mixture(family, tmp_path / "m") if family == "mixtral" else dense_of(family))


def sites_of(model: Any) -> tuple[Site, ...]:
    return tuple(find_sites(model, model.config.num_hidden_layers, CPU))


def rows_of(count: int = 9, seed: int = 0) -> list[ItemRow]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 12, count)
    return [ItemRow(rng.integers(3, 60, n + 3).tolist(), int(n)) for n in lengths]


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


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
@pytest.mark.parametrize("part", ["prompt", "whole"])
def test_scores_are_those_of_single_texts(tmp_path: Path, model: Any, part: TextPart) -> None:
    rows, sites = rows_of(), sites_of(model)
    assert {site.kind for site in sites} == {"experts" if model.config.model_type == "mixtral" else "neurons"}
    found = scores(model, sites, rows, tmp_path, part)
    total = [torch.zeros(2, site.units) for site in sites]
    for i, row in enumerate(rows):
        for n, activations in enumerate(alone(model, sites, row, part)):
            assert found.of_site(n)[i] == pytest.approx(activations[1:].abs().mean(0).numpy(), rel=1e-5, abs=5e-6)
            total[n][i % 2] += activations[1:].abs().sum(0)
    for n in range(len(sites)):
        torch.testing.assert_close(found.summed("total")[n], total[n], rtol=1e-5, atol=1e-5)
        sums = [found.of_site(n)[task::3].sum(0) for task in range(3)]
        assert found.summed("scores")[n].numpy() == pytest.approx(np.stack(sums), rel=1e-5)
    lengths = [(row.prompt if part == "prompt" else len(row.tokens)) - 1 for row in rows]
    assert found.sums["tokens"].tolist() == [sum(lengths[::2]), sum(lengths[1::2])]


def test_a_text_of_one_token_keeps_it(tmp_path: Path, model: Any) -> None:
    sites = sites_of(model)
    rows = [ItemRow([5], 1), ItemRow([5, 6, 7], 3)]
    found = scores(model, sites, rows, tmp_path)
    assert np.abs(found.of_site(0)[0] - alone(model, sites, rows[0], "prompt")[0].abs().mean(0).numpy()).max() < 1e-6
    assert found.sums["tokens"].tolist() == [1, 2]


def test_an_interrupted_pass_goes_on(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.neurons.function_scores._CHECKPOINT_ROWS", 1)
    rows, sites = rows_of(20), sites_of(model)
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
        assert torch.equal(found.summed("total")[n], expected.summed("total")[n])
        assert torch.equal(found.summed("scores")[n], expected.summed("scores")[n])
    assert torch.equal(found.sums["tokens"], expected.sums["tokens"])


def test_a_full_disk_is_an_error(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WorkbenchError, match=r"scores\.f32: the scores of 144 neurons on 9 texts take 0\.0 GB \(No space left"):
        scores(model, sites_of(model), rows_of(), tmp_path)


def test_the_head_is_not_computed(model: Any) -> None:
    sites = sites_of(model)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was computed"))
    stream(model, sites, rows_of(3), lambda *_: None)

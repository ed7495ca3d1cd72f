"""Selectors: what they choose, the mass that they capture, and the model that is left, against direct computations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge  # type: ignore[import-untyped]

from worlds.planted import random_rows
from worlds.project import CPU
from worlds.tiny import live

from workbench.activations.feedforward import FeedForward, FeedForwardSample, feed_forward_layers, sample_feed_forward
from workbench.activations.losses import losses
from workbench.activations.partition import Division, Partition, divide
from workbench.activations.selectors import Selector, captured, centroids, oracle, ridges, selected, selecting, shares
from workbench.activations.sites import find_sites


class World(NamedTuple):
    """A tiny llama, its layers, a sample that fits selectors and one that judges them, and a partition with two shared experts of eight."""

    model: Any
    layers: tuple[FeedForward, ...]
    fitted: FeedForwardSample
    judged: FeedForwardSample
    partition: Partition


@pytest.fixture
def world(dense_of: Callable[[str], Path]) -> World:
    model = live(dense_of("llama"))
    layers = feed_forward_layers(model, find_sites(model, 3, CPU))
    fitted, judged = (sample_feed_forward(model, layers, random_rows([14] * n, seed), size=400) for n, seed in ((40, 1), (8, 2)))
    return World(model, layers, fitted, judged, divide(Division("cmoe", 8, shared=2), layers, fitted))


def test_selected_experts() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4, 0.9], [-3.0, -1.0, -2.0, -5.0]])
    assert selected(scores, 0, 2).tolist() == [[False, True, False, True], [False, True, True, False]]
    assert selected(scores, 1, 2).tolist() == [[True, False, False, True], [True, True, False, False]]
    with pytest.raises(ValueError, match="3 shared experts are more than the 2"):
        selected(scores, 3, 2)


def test_shares_of_the_mass(world: World) -> None:
    layers, judged, partition = world.layers, world.judged, world.partition
    of, columns = partition.layers[1], layers[1].site.columns()
    token = judged.activations[1][7]
    mass = [sum(abs(float(token[i])) * float(columns[i].norm()) for i in expert.tolist()) for expert in of.experts]
    assert shares(judged, partition, 1)[7].tolist() == pytest.approx([m / sum(mass) for m in mass], rel=1e-4)


def expert_by_expert(experts: torch.Tensor, rows: torch.Tensor) -> Any:
    """A hook that replaces a layer's output by the sum of the first two experts and of the two others of the largest x · row."""

    def forward(mlp: Any, args: tuple[torch.Tensor], _out: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(args[0])
        for b, text in enumerate(args[0]):
            for t, x in enumerate(text):
                chosen = (rows @ x)[2:].argsort(descending=True)[:2] + 2
                for index in experts[[0, 1, *chosen.tolist()]]:
                    a = torch.nn.functional.silu(mlp.gate_proj.weight[index] @ x) * (mlp.up_proj.weight[index] @ x)
                    out[b, t] += mlp.down_proj.weight[:, index] @ a
        return out

    return forward


def test_the_model_that_is_left(world: World) -> None:
    """Losses with selected experts are those of a forward pass whose feed-forward layers are computed expert by expert."""
    model, layers, partition = world.model, world.layers, world.partition
    selector = centroids(layers, partition)
    texts = random_rows([14] * 3, 5)
    with selecting(model, layers, partition, selector, 4):
        left = losses(model, texts)
    handles = [
        layer.mlp.register_forward_hook(expert_by_expert(partition.layers[number].experts, selector.rows[number]))
        for number, layer in enumerate(model.model.layers)
    ]
    expected = losses(model, texts)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(left.sums, expected.sums, atol=1e-4, rtol=1e-5)
    assert abs(left.mean - losses(model, texts).mean) > 1e-3


def test_the_oracle_captures_most(world: World) -> None:
    """No selector beats the oracle, fitted ones beat the mean of gate rows, and all experts have all of the mass."""
    _, layers, fitted, judged, partition = world
    made: list[Selector] = [oracle(layers, partition), centroids(layers, partition), ridges(fitted, partition)]
    mass = {s.name: float(captured(judged, partition, s, 4).mean()) for s in made}
    assert max(mass, key=lambda name: mass[name]) == "oracle"
    assert mass["oracle"] > mass["ridge"] > mass["centroid"]
    assert all(torch.allclose(captured(judged, partition, s, 8), torch.ones(3)) for s in made)


def test_ridge_against_scikit_learn(world: World) -> None:
    fitted, partition = world.fitted, world.partition
    x = fitted.inputs[2].double().numpy()
    penalty = 1e-2 * float(np.mean(np.square(x).sum(0)))
    expected = Ridge(alpha=penalty, fit_intercept=False).fit(x, shares(fitted, partition, 2).double().numpy()).coef_
    np.testing.assert_allclose(ridges(fitted, partition).rows[2].numpy(), expected, atol=1e-6)

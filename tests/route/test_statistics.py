"""Statistics of pooled states: sums, scatter and the ridge solution, against direct computations and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workbench.ground.errors import WorkbenchError
from workbench.route.centroid import CentroidRouter
from workbench.route.deciding.pooling import SHRINKAGE, statistics_of
from workbench.route.deciding.router import REFUSED
from workbench.route.deciding.samples import OUTSIDE, OWN, Samples
from workbench.route.deciding.statistics import Scatter, Statistics, by_brick, solve
from workbench.route.ridge import Ridge, RidgeRouter
from workbench.steps.route import Prompts

SIZES = (7, 30, 12)  # one brick with more prompts than dimensions
WIDTH = 16


def states(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 states [n, width] and the brick of each."""
    torch.manual_seed(seed)
    labels = torch.tensor([i for i, size in enumerate(SIZES) for _ in range(size)])
    return torch.randn(len(labels), WIDTH) + 2 * torch.randn(len(SIZES), WIDTH)[labels] + 3, labels


def router(
    kind: type[RidgeRouter] | type[CentroidRouter], names: tuple[str, ...], parts: list[Statistics]
) -> RidgeRouter | CentroidRouter:
    more = {"strength": 0.05} if kind is RidgeRouter else {}
    return kind(names, layer=1, statistics=tuple(parts), negatives=Statistics.of(others()), **more)


def others() -> Tensor:
    """States of requests that no brick is for."""
    torch.manual_seed(9)
    return 2 * torch.randn(40, WIDTH) + 1


def seen(vectors: Tensor) -> Prompts:
    """Prompts whose windows have the same states."""
    return Prompts([""] * len(vectors), vectors[:, None].expand(-1, 4, -1))


def test_statistics_are_sums_that_add_up_and_are_read_again() -> None:
    vectors, _ = states()
    found = Statistics.of(vectors)
    assert found.count == len(vectors)
    assert found.root.shape == (WIDTH, WIDTH)  # no more rows than columns
    torch.testing.assert_close(found.gram, vectors.double().T @ vectors.double(), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found.mean, vectors.double().mean(0), rtol=1e-12, atol=1e-12)
    vectors, _ = states()
    for split in (1, 5, 40):
        both = Statistics.of(vectors[:split]) + Statistics.of(vectors[split:])
        whole = Statistics.of(vectors)
        assert both.count == whole.count
        torch.testing.assert_close(both.total, whole.total, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(both.gram, whole.gram, rtol=1e-12, atol=1e-9)
    vectors, _ = states()
    tensors = Statistics.of(vectors).tensors("a.")
    assert set(tensors) == {"a.count", "a.total", "a.root"}
    found = Statistics.read(tensors, "a.")
    assert found.count == len(vectors)
    torch.testing.assert_close(found.gram, Statistics.of(vectors).gram, rtol=1e-12, atol=1e-9)


def test_every_brick_counts_alike_in_the_scatter() -> None:
    vectors, labels = states()
    scatter = Scatter.of(by_brick(vectors, labels, len(SIZES)))
    x = vectors.double()
    means = torch.stack([x[labels == i].mean(0) for i in range(len(SIZES))])
    centre = means.mean(0)
    weights = torch.tensor([1 / (size * len(SIZES)) for size in SIZES], dtype=torch.float64)[labels]
    total = (x - centre).T @ (weights[:, None] * (x - centre))
    within = (x - means[labels]).T @ (weights[:, None] * (x - means[labels]))
    torch.testing.assert_close(scatter.centre, centre, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scatter.means, means - centre, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scatter.total, total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scatter.within, within, rtol=1e-10, atol=1e-10)


def test_ridge_is_scikit_learns_and_centroid_is_a_centred_cosine() -> None:
    from sklearn.linear_model import Ridge

    vectors, labels = states()
    scatter = Scatter.of(by_brick(vectors, labels, len(SIZES)))
    alpha = 0.05 * float(scatter.total.trace()) / WIDTH
    weights = (1 / (torch.tensor(SIZES).double() * len(SIZES)))[labels].numpy()
    targets = torch.nn.functional.one_hot(labels).double().numpy()
    reference = Ridge(alpha=alpha, solver="cholesky").fit(vectors.double().numpy(), targets, sample_weight=weights)
    made = router(RidgeRouter, ("a", "b", "c"), by_brick(vectors, labels, len(SIZES)))
    scores, _ = made.score(seen(vectors))
    torch.testing.assert_close(solve(scatter, 0.05).T, torch.from_numpy(reference.coef_), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(scores, torch.from_numpy(reference.predict(vectors.double().numpy())), rtol=1e-8, atol=1e-8)
    vectors, labels = states()
    made = router(CentroidRouter, ("a", "b", "c"), by_brick(vectors, labels, len(SIZES)))
    scores, _ = made.score(seen(vectors))
    means = torch.stack([vectors[labels == i].double().mean(0) for i in range(len(SIZES))])
    centre = means.mean(0)
    for row, state in zip(scores, vectors.double(), strict=True):
        expected = torch.stack([torch.cosine_similarity(state - centre, mean - centre, dim=0) for mean in means])
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-9)


def test_prompts_without_difference_are_refused() -> None:
    same = Statistics.of(torch.ones(4, WIDTH))
    with pytest.raises(WorkbenchError, match="all calibration prompts have the same hidden state"):
        router(CentroidRouter, ("a", "b"), [same, same]).confidence(torch.ones(1, WIDTH))


def test_confidence_is_a_cosine_and_a_difference_of_mahalanobis_distances() -> None:
    import numpy as np
    from scipy.spatial.distance import mahalanobis

    vectors, labels = states()
    made = router(CentroidRouter, ("a", "b", "c"), by_brick(vectors, labels, len(SIZES)))
    scatter = made.scatter
    x = vectors.double()

    def inverse(covariance: Tensor, least: float = 0.0) -> Tensor:
        spread = max(float(covariance.trace()) / WIDTH, least)
        floor = 1e-6 * scatter.total.trace() / WIDTH
        eye = torch.eye(WIDTH, dtype=torch.float64)
        return torch.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * spread * eye + floor * eye)

    within, around = (
        inverse(scatter.within),
        inverse(torch.from_numpy(np.cov(others().double().numpy().T, bias=True)), float(scatter.total.trace()) / WIDTH),
    )
    middle = others().double().mean(0)
    means = [x[labels == i].mean(0) for i in range(len(SIZES))]
    centre = torch.stack(means).mean(0)
    far = torch.cat([x, x[:3] * -5])
    spread = sum(mahalanobis(mean, centre, within) for mean in means) / len(means)
    for state, found in zip(far, made.confidence(far), strict=True):
        nearest = min(mahalanobis(state, mean, within) for mean in means)
        away = state - centre
        cosines = [
            float(away @ within @ (mean - centre)) / (mahalanobis(state, centre, within) * mahalanobis(mean, centre, within))
            for mean in means
        ]
        expected = max(cosines) + (mahalanobis(state, middle, around) - nearest) / spread
        assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_surest_window_decides_and_own_negatives_are_refused() -> None:
    vectors, labels = states()
    made = router(RidgeRouter, ("a", "b", "c"), by_brick(vectors, labels, len(SIZES)))
    strange = others()[: len(vectors)].repeat(2, 1)[: len(vectors)]
    for place in range(4):
        windows = torch.stack([vectors if i == place else strange for i in range(4)], 1)
        surer = made.confidence(vectors) >= made.confidence(strange)
        (scores, confidence), (expected, sure) = made.score(Prompts([""] * len(vectors), windows)), made.score(seen(vectors))
        assert int(surer.sum()) > 40
        assert torch.equal(scores[surer], expected[surer])
        assert torch.equal(confidence[surer], sure[surer])
    # They lie beside brick b; the bricks' own prompts are not refused.
    vectors, labels = states()
    own = vectors[labels == 1] + torch.nn.functional.one_hot(torch.tensor(3), WIDTH) * 12
    made = router(RidgeRouter, ("a", "b", "c"), by_brick(vectors, labels, len(SIZES)))
    told = replace(made, refused={"b": Statistics.of(own[:10])})
    assert bool((made.score(seen(own[10:]))[1] > REFUSED).all())
    assert bool((told.score(seen(own[10:]))[1] == REFUSED).all())
    assert torch.equal(told.score(seen(vectors))[1], made.score(seen(vectors))[1])
    # A router that is read again refuses the same; names in its file do not change between versions.
    assert "tensor" not in repr(told)
    again = Ridge.restore(told.settings(), told.tensors())
    assert torch.equal(again.decide(seen(own)).confidence, told.decide(seen(own)).confidence)
    parts = ("negatives", *(f"statistics.{name}" for name in "abc"), "refused.b")
    assert set(told.tensors()) == {f"{part}.{name}" for part in parts for name in ("count", "total", "root")}


def test_the_statistics_of_samples_are_those_of_their_last_window() -> None:
    """Each of the step's own negatives counts for the brick whose mean it is most like; other samples and windows play no part."""
    vectors, labels = states()
    away = [2 * vectors[labels == brick].mean(0) - vectors.mean(0) for brick in (2, 0)]  # two negatives beyond c, one beyond a
    hidden = torch.cat([vectors, others()[:9], torch.stack([away[0], away[0] + 0.1, away[1]])])
    labels = torch.cat([labels, torch.full((9,), OUTSIDE), torch.full((3,), OWN)])
    windows = torch.stack([hidden, *torch.randn(3, len(hidden), WIDTH)], 1)
    samples = Samples(("a", "b", "c"), [""] * len(hidden), torch.stack([labels] * 4, 1), hidden=windows)
    rows = torch.arange(1, len(hidden))
    found = statistics_of(samples, rows)
    whole = {"negatives": found["negatives"], **dict(zip("abc", found["statistics"], strict=True))}
    expected = {"negatives": hidden[labels == OUTSIDE], **{name: hidden[1:][labels[1:] == i] for i, name in enumerate("abc")}}
    assert set(found["refused"]) == {"a", "c"}
    expected |= {"own a": hidden[-1:], "own c": hidden[-3:-1]}
    for name, part in (whole | {f"own {name}": part for name, part in found["refused"].items()}).items():
        assert part.count == len(expected[name])
        torch.testing.assert_close(part.total, expected[name].double().sum(0))
        torch.testing.assert_close(part.gram, expected[name].double().T @ expected[name].double())

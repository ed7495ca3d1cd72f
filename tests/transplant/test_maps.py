"""Maps between units beside numpy and scikit-learn, on activations with a planted relation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worlds.permuted import Order

from workbench.transplant.readings import PENALTIES, assignment, correlations, input_map, matched, output_map, ridge


@pytest.fixture
def activations() -> torch.Tensor:
    """[400, 12], with different means and deviations."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(400, 12, generator=generator) * torch.linspace(0.5, 3, 12) + torch.linspace(-2, 2, 12)


def noisy(values: torch.Tensor, share: float, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return values + share * values.std(0) * torch.randn(values.shape, generator=generator)


def test_correlations_are_those_of_numpy(activations: torch.Tensor) -> None:
    other = noisy(activations[:, :5], 1.0)
    expected = np.corrcoef(activations.T.numpy(), other.T.numpy())[:12, 12:]
    np.testing.assert_allclose(correlations(activations, other).numpy(), expected, atol=1e-5)
    map_ = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    given = (activations @ map_.T).numpy()
    values = [np.corrcoef(given[:, i], other[:, i].numpy())[0, 1] for i in range(5)]
    np.testing.assert_allclose(matched(map_, activations, other).numpy(), values, atol=1e-5)


def test_constant_units_match_nothing(activations: torch.Tensor) -> None:
    activations[:, 3] = 7.25
    assert correlations(activations, activations)[3].abs().max() == 0
    assert len(matched(None, activations, activations)) == 11


def test_a_planted_assignment_is_recovered(activations: torch.Tensor) -> None:
    planted = Order.drawn(12, 3)
    goal = noisy(planted.columns(activations), 0.05)
    assert torch.equal(assignment(activations, goal), planted.matrix())


def test_units_without_a_counterpart_are_left_over(activations: torch.Tensor) -> None:
    """A wider goal has rows of zeros, a narrower one leaves start units out."""
    planted = Order.drawn(12, 3)
    goal = noisy(planted.columns(activations), 0.05)
    wider = assignment(activations[:, :8], goal)
    assert wider.abs().sum() == 8
    assert torch.equal(wider, torch.where(planted.order[:, None] < 8, planted.matrix()[:, :8], torch.zeros(())))
    assert torch.equal(assignment(activations, goal[:, :5]), planted.matrix()[:5])


@pytest.mark.parametrize("centered", [True, False])
def test_ridge_is_that_of_scikit_learn(activations: torch.Tensor, centered: bool) -> None:
    """The penalty is relative to the mean square of a start unit, and a planted map is found."""
    from sklearn.linear_model import Ridge

    planted = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    goal = noisy(activations @ planted.T, 0.05)
    found = ridge(activations, goal, centered=centered)
    start = activations - activations.mean(0) if centered else activations
    size = float(start.double().square().sum() / 12)
    fits = [
        Ridge(alpha=penalty * size, fit_intercept=centered).fit(activations.double().numpy(), goal.double().numpy()).coef_
        for penalty in PENALTIES
    ]
    assert min(np.abs(fit - found.numpy()).max() for fit in fits) < 1e-4
    assert float((found - planted).norm() / planted.norm()) < 0.05


def test_outputs_that_span_few_directions_are_mapped_in_all(activations: torch.Tensor) -> None:
    """Twelve outputs of a module with five inputs: an update may write what the module never writes."""
    planted = Order.drawn(12, 3)
    start = activations[:, :5] @ torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    goal = 1.5 * planted.columns(start)
    update = torch.randn(12, 2, generator=torch.Generator().manual_seed(5))
    expected = 1.5 * planted.matrix() @ update
    assert float((output_map(start, goal) @ update - expected).norm() / expected.norm()) < 0.01
    assert float((ridge(start, goal, centered=True) @ update - expected).norm() / expected.norm()) > 0.3
    shifted = activations @ torch.diag(torch.linspace(1, 2, 12))
    assert float((activations - shifted @ input_map(shifted, activations).T).norm() / activations.norm()) < 0.01


def test_ridge_is_exact_beside_a_few_large_units() -> None:
    """Activations of language models have units that are large and move together; here positions are also fewer than units."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(80, 512, generator=generator)
    start[:, :8] = 20_000 * (1 + 0.1 * torch.randn(80, 1, generator=generator)) * torch.linspace(0.8, 1.2, 8)
    goal = start[:, 8:16] @ torch.randn(8, 16, generator=generator)
    x, y, size = start.double(), goal.double(), start.double().square().mean()
    errors, maps = [], []
    for penalty in PENALTIES:
        fits = [
            torch.linalg.solve(a.T @ a + penalty * s * torch.eye(512).double(), a.T @ b).T
            for a, b, s in ((x[:64], y[:64], x[:64].square().sum() / 512), (x, y, size * 80))
        ]
        errors.append(float((x[64:] @ fits[0].T - y[64:]).square().sum()))
        maps.append(fits[1])
    best = maps[min(range(len(errors)), key=errors.__getitem__)]
    torch.testing.assert_close(ridge(start, goal, centered=False).double(), best, atol=1e-5, rtol=1e-4)


def test_ridge_takes_a_large_penalty_where_there_is_nothing_to_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    start, goal = torch.randn(60, 40, generator=generator), torch.randn(60, 3, generator=generator)
    assert float(ridge(start, goal, centered=True).norm()) < 0.7 * float(torch.linalg.lstsq(start, goal).solution.norm())

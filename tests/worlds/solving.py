"""Second moments, the metric of each closed-form method on them, and the published formulas in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import inv, solve

from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.solver import KeyMetric
from workbench.edit.closed_form.solver import solve as solve_keys
from workbench.recipe.methods import methods

D_IN, D_OUT = 48, 32
TOLERANCE = 1e-9
STRENGTHS: dict[str, dict[str, float]] = {
    "rome": {}, "memit": {"lambda": 0.1}, "emmet": {"mu": 0.01}, "alphaedit": {"energy": 0.5, "l2": 0.002},
    "encore": {"lambda": 0.1, "eta": 0.002},
}  # fmt: skip


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance() -> Tensor:
    """Eigenvalues between 0.1 and 3, in a random basis."""
    basis = torch.linalg.qr(random(D_IN, D_IN, seed=1))[0]
    return basis @ torch.diag(torch.linspace(0.1, 3, D_IN, dtype=torch.float64)) @ basis.T


def update(keys: Tensor, changes: Tensor, metric: KeyMetric, mu: float) -> tuple[Tensor, Tensor]:
    """ΔW as a product of two factors."""
    return solve_keys(keys.T, metric, mu).update(changes.T)


def preset(name: str) -> tuple[KeyMetric, float]:
    """G and μ as the method makes them of second moments; UltraEdit's are the identity and 1."""
    if name == "ultraedit":
        return KeyMetric(None, torch.ones(D_IN, dtype=torch.float64)), 1.0
    values, vectors = torch.linalg.eigh(covariance())
    method = methods()[f"edit:{name}"].model_validate({"edit": name, "facts": "f.jsonl", **STRENGTHS[name]})
    assert isinstance(method, ClosedForm)
    return method.metric(Moments(vectors, values, 1000, {})), method.ridge


def naive(name: str, keys: Tensor, changes: Tensor, written: Tensor) -> Tensor:
    """ΔW [out, in] by the published formula.

    Args:
        keys: K [in, n].
        changes: R [out, n].
        written: Keys [in, p] that are written already.
    """
    c, eye = covariance(), torch.eye(D_IN, dtype=torch.float64)
    gram, before = keys @ keys.T, written @ written.T
    trace = c.trace()
    if name == "rome":  # the optimality conditions of min tr(ΔW C ΔWᵀ) under ΔW K = R and ΔW K₁ = 0
        fixed = torch.cat([keys, written], 1)
        wanted = torch.cat([changes, torch.zeros(D_OUT, written.shape[1], dtype=torch.float64)], 1)
        count = fixed.shape[1]
        system = torch.cat([torch.cat([c, fixed], 1), torch.cat([fixed.T, torch.zeros(count, count, dtype=torch.float64)], 1)], 0)
        return solve(system, torch.cat([torch.zeros(D_IN, D_OUT, dtype=torch.float64), wanted.T], 0))[:D_IN].T
    if name == "memit":
        return changes @ keys.T @ inv(0.1 * D_IN * c + before + gram)
    if name == "emmet":
        mu = 0.01 * D_IN
        c = c + before / mu
        return changes @ inv(keys.T @ inv(c) @ keys + mu * torch.eye(keys.shape[1], dtype=torch.float64)) @ keys.T @ inv(c)
    if name == "alphaedit":
        u, values, _ = torch.linalg.svd(c)
        small = u[:, values.flip(0).cumsum(0).flip(0) <= 0.5 * values.sum()]
        assert 0 < small.shape[1] < D_IN
        p = small @ small.T
        return solve(p @ (gram + before) + 0.002 * trace * eye, p @ keys @ changes.T).T
    if name == "encore":
        return changes @ keys.T @ inv(0.1 * D_IN * c + 0.002 * trace * eye + before + gram)
    assert name == "ultraedit"
    return solve(keys @ keys.T + before + eye, keys @ changes.T).T


def product(keys: Tensor, changes: Tensor, metric: KeyMetric, mu: float) -> Tensor:
    left, right = update(keys, changes, metric, mu)
    return left @ right


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def sequence(keys: Tensor, changes: Tensor, metric: KeyMetric, mu: float, sizes: list[int], *, history: bool) -> Tensor:
    """Batch after batch, each asked for what is missing of its changes."""
    done = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for k, r in zip(keys.split(sizes, 1), changes.split(sizes, 1), strict=True):
        done = done + product(k, r - done @ k, metric, mu)
        metric = metric.after(k, mu) if history else metric
    return done

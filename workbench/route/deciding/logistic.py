"""Multinomial logistic regression, solved by L-BFGS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def fit_logistic(rows: Any, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Return the weights and biases that minimize Σ wₙ·(−log p(label)) + ‖W‖² / (2·strength).

    wₙ makes all classes count alike: items / (classes · items of the class). The biases are free. This is scikit-learn's
    LogisticRegression(C=strength, class_weight="balanced").

    Args:
        rows: [item, feature], a scipy sparse matrix, float64.
        labels: [item], class numbers; every class occurs.
        classes: Number of classes.
        strength: Inverse of the penalty.

    Returns:
        Weights [class, feature] and biases [class], float64.
    """
    import numpy as np
    from scipy.optimize import minimize

    items, features = rows.shape
    target = labels.numpy()
    balance = items / (classes * np.bincount(target, minlength=classes)[target])
    places = (np.arange(items), target)
    transposed = rows.T.tocsr()

    def loss(flat: Any) -> tuple[float, Any]:
        weights, biases = flat[: features * classes].reshape(features, classes), flat[features * classes :]
        logits = rows @ weights + biases
        logits -= logits.max(1, keepdims=True)
        powers = np.exp(logits)
        sums = powers.sum(1, keepdims=True)
        value = -(balance * (logits[places] - np.log(sums[:, 0]))).sum() + (weights**2).sum() / (2 * strength)
        error = powers / sums
        error[places] -= 1
        error *= balance[:, None]
        gradient = transposed @ error + weights / strength
        return float(value), np.concatenate([gradient.ravel(), error.sum(0)])

    start = np.zeros(features * classes + classes)
    solved = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300, "ftol": 1e-10, "gtol": 1e-5})
    weights = solved.x[: features * classes].reshape(features, classes)
    return torch.from_numpy(weights.T.copy()), torch.from_numpy(solved.x[features * classes :].copy())

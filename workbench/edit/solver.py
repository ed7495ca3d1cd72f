"""The one linear solve behind the closed-form editors: ΔW = R Aᵀ with A = G K (KᵀG K + μI)⁻¹, in float64.

K [d_in, n] are keys, R [d_out, n] the wanted changes of the output, G an inverse metric, μ a ridge. With G = C⁻¹ and μ = 0 it is
ROME (2202.05262, eq. 2); with G = (λC)⁻¹ and μ = 1 MEMIT (2210.07229, eq. 14), with keys already written in the metric as well;
with μ > 0 and G = C⁻¹ EMMET (2403.14236); with G = U (L·I)⁻¹ Uᵀ over the directions U that texts hardly use AlphaEdit (2410.02355);
with G = (λC + ηI)⁻¹ ENCORE (2502.01636); with G = I UltraEdit (2505.14679). Only n × n systems are solved beside the factored C.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.weights.lowrank import Factors

INDEPENDENT = 1e-9
"""Singular values of an update below this share of the largest are rounding."""
DEPENDENT = 1e-9
"""What a key, computed in float32, has of its own beside other keys, as a share of kᵀG k: below this it is rounding."""
ROUNDING = 1e-15
"""The same in float64, where a ridge holds the system."""


@dataclass(frozen=True)
class Metric:
    """G = Q (D + P̃ P̃ᵀ/μ)⁻¹ Qᵀ, with P̃ = QᵀP for keys P that are written already.

    Attributes:
        basis: [d, m] orthonormal columns Q; None stands for the identity.
        diagonal: [m], D, positive.
        written: For each group of written keys P [d, p], in the order in which they were added: P, and G P (PᵀG P + μI)⁻¹ with the G
            before them. Both are kept, so that a thousand groups cost a thousand products and not 2¹⁰⁰⁰.
    """

    basis: Tensor | None
    diagonal: Tensor
    written: tuple[tuple[Tensor, Tensor], ...] = field(default=())

    def apply(self, x: Tensor) -> Tensor:
        """G x for x [d, ·], float64. Each group of written keys is taken out by Woodbury's identity."""
        found = self._plain(x)
        for keys, right in self.written:
            found = found - right @ (keys.T @ found)
        return found

    def after(self, keys: Tensor, mu: float) -> Metric:
        """The metric once keys [d, n] have been written: a later change of their outputs costs ‖ΔW K‖²/μ. With μ = 0 it keeps
        ΔW K = 0 exactly."""
        return Metric(self.basis, self.diagonal, (*self.written, (keys, right_factor(keys, self, mu))))

    def energy(self, x: Tensor) -> Tensor:
        """xᵀG x of each column [·], as if nothing had been written: what `apply` leaves of it is measured against this."""
        return (x * self._plain(x)).sum(0)

    def _plain(self, x: Tensor) -> Tensor:
        inner = x if self.basis is None else self.basis.T @ x
        inner = inner / self.diagonal[:, None]
        return inner if self.basis is None else self.basis @ inner


def right_factor(keys: Tensor, metric: Metric, mu: float) -> Tensor:
    """A [d_in, n]: what multiplies the wanted changes.

    Args:
        keys: K [d_in, n], float64.
        metric: G.
        mu: Ridge; 0 writes every change exactly, as far as the keys are independent of each other and of written ones. Equal keys
            get the mean of their changes, and written keys are not written again.
    """
    through = metric.apply(keys)
    return _solved(keys.T @ through, mu, through.T, float(metric.energy(keys).max())).T


def factors_of(left: Tensor, right: Tensor) -> Factors:
    """A product as float32 factors of its own rank: dependent keys add none, and no rank exceeds that of the matrix.

    Args:
        left: [d_out, n], float64.
        right: [n, d_in], float64.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T)
    rank = max(1, int((values > INDEPENDENT * values[:1]).sum()))
    root = values[:rank].sqrt()
    # One sign for each pair, so that equal updates give equal factors.
    first = q_left @ u[:, :rank]
    signs = first.gather(0, first.abs().argmax(0)[None])[0].sign()
    return Factors((first * root * signs).float().contiguous(), ((q_right @ v[:rank].T) * root * signs).T.float().contiguous())


def _solved(gram: Tensor, mu: float, right: Tensor, energy: float) -> Tensor:
    """(gram + μI)⁻¹ right for a symmetric gram; for μ = 0 the least-norm solution where it is singular.

    Args:
        gram: [n, n], KᵀG K.
        mu: Ridge.
        right: [n, ·].
        energy: The largest kᵀG k before keys were written: shares below `DEPENDENT` of it are rounding of the keys.
    """
    system = gram + mu * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    system = (system + system.T) / 2
    floor = (ROUNDING if mu else DEPENDENT) * (energy + mu)
    factor, failed = torch.linalg.cholesky_ex(system)
    if not int(failed) and float(factor.diagonal().min()) ** 2 > floor:
        found: Tensor = torch.cholesky_solve(right, factor)
        return found
    values, vectors = torch.linalg.eigh(system)
    kept = values > floor
    nearest: Tensor = vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept, None])
    return nearest

"""Solve the linear system of the closed-form editors in float64: ΔW = R Aᵀ with A = G K (KᵀG K + μI)⁻¹.

K [d_in, n] holds the keys, R [d_out, n] the requested changes of the output; G is an inverse metric and μ a ridge. The editors
differ in G and μ:

- ROME (2202.05262, eq. 2): G = C⁻¹ and μ = 0.
- MEMIT (2210.07229, eq. 14): G = (λC)⁻¹ and μ = 1, with keys that are already written in the metric.
- EMMET (2403.14236): G = C⁻¹ and μ > 0.
- AlphaEdit (2410.02355): G = U (L·I)⁻¹ Uᵀ over the directions U that text hardly uses.
- ENCORE (2502.01636): G = (λC + ηI)⁻¹.
- UltraEdit (2505.14679): G = I.

The system is solved on its smaller side. With fewer keys than inputs it is n × n. With more keys, the push-through identity (X Xᵀ
+ μI)⁻¹ X = X (XᵀX + μI)⁻¹ for whitened keys X gives a system of at most d_in × d_in, and the keys are needed only as the sum X
Xᵀ, which is computed in chunks. Both sides have the same nonzero eigenvalues, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from workbench.ground.lazy import torch
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor

INDEPENDENT = 1e-9
"""Singular values of an update below this share of the largest one are rounding errors."""
DEPENDENT = 1e-9
"""A float32 key whose part that is independent of other keys is below this share of kᵀG k is rounding error."""
ROUNDING = 1e-15
"""The same for float64, if there is a ridge."""
CHUNK = 512
"""Number of keys that are converted to float64 and whitened at a time."""


@dataclass(frozen=True)
class _Written:
    """A group of written keys that is small enough to be stored as columns.

    Attributes:
        keys: X [m, p], whitened.
        right: T X (XᵀT X + μI)⁻¹ [m, p], with T before the group was written.
        mu: Ridge of the keys; 0 for keys whose outputs must not change at all, negative for keys that are taken out again.
    """

    keys: Tensor
    right: Tensor
    mu: float


@dataclass(frozen=True)
class KeyMetric:
    """Inverse metric G = Q D^(-1/2) T D^(-1/2) Qᵀ; T is the identity until keys are written.

    Writing keys P with ridge μ changes T to (T⁻¹ + P̃ P̃ᵀ/μ)⁻¹ with P̃ = D^(-1/2) QᵀP. Small groups are handled by Woodbury's
    identity; as soon as they have more columns than T, they are summed in T⁻¹ itself.

    Attributes:
        basis: Q [d, m], orthonormal columns; None: the identity.
        diagonal: D [m], positive.
        free: N [m, f], the whitened directions in which outputs may still change; None: all directions.
        factor: Lower Cholesky factor of T⁻¹ [f, f] within `free`, without the groups in `written`; None: the identity.
        written: Groups of written keys, in the order in which they were added. Keys and right factors are both stored, so that a
            thousand groups cost a thousand products and not 2¹⁰⁰⁰.
    """

    basis: Tensor | None
    diagonal: Tensor
    free: Tensor | None = None
    factor: Tensor | None = None
    written: tuple[_Written, ...] = field(default=())

    @property
    def size(self) -> int:
        """Number of directions in which a change is possible: an upper bound of the system's size."""
        return len(self.diagonal) if self.free is None else self.free.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """Return G x for x [d, ·], float64."""
        return self._unwhiten(self._transform(self.whitened(x)))

    def after(self, keys: Tensor, mu: float) -> KeyMetric:
        """Return the metric after keys are written: a later change of their outputs costs ‖ΔW K‖²/μ.

        Args:
            keys: [d, n].
            mu: Ridge; 0 keeps ΔW K = 0 exactly.
        """
        return self.after_all(torch.split(keys, CHUNK, 1), mu)

    def after_all(self, chunks: Iterable[Tensor], mu: float) -> KeyMetric:
        """Return the metric after keys in chunks [d, ·] are written; more keys than inputs are never in memory together."""
        chunks_so_far: list[Tensor] = []
        limit = self.size - sum(group.keys.shape[1] for group in self.written)  # more keys than this are summed in T⁻¹
        gram, energy = None, 0.0
        for chunk in chunks:
            whitened = self.whitened(chunk)
            energy = max(energy, _energy(whitened))
            if gram is None:
                chunks_so_far.append(whitened)
                if sum(part.shape[1] for part in chunks_so_far) > limit:
                    gram, chunks_so_far = _gram(chunks_so_far, len(self.diagonal)), []
            else:
                gram.addmm_(whitened, whitened.T)
        if gram is not None:
            return self._sum_groups(gram, mu, energy)
        if not chunks_so_far:
            return self
        whitened = torch.cat(chunks_so_far, 1)
        transformed = self._transform(whitened)
        right = _solve_ridge(whitened.T @ transformed, mu, transformed.T, energy).T
        return replace(self, written=(*self.written, _Written(whitened, right, mu)))

    def without_all(self, chunks: Iterable[Tensor], mu: float) -> KeyMetric:
        """Return the metric without some of its written keys, in chunks [d, ·]: the exact inverse of `after_all`.

        T⁻¹ is I + Σ x xᵀ/μ over the whitened keys that are written. Without X it is T⁻¹ − X Xᵀ/μ, and Woodbury's identity gives
        T + T X (μI − XᵀT X)⁻¹ XᵀT: the formula of `after_all` with −μ in the place of μ. The remaining sum is at least I, so
        μI − XᵀT X is positive definite; its smallest eigenvalue is μ/(1 + g) for a key with g = xᵀx/μ, and the relative error is
        about g times that of float64.

        Args:
            chunks: Keys that are written with this ridge.
            mu: Their ridge, not 0: keys that close directions cannot be subtracted.
        """
        return self.after_all(chunks, -mu)

    def whitened(self, x: Tensor) -> Tensor:
        """Return D^(-1/2) Qᵀx for x [d, ·], float64; before keys are written, a column's squared length is xᵀG x."""
        x = x.to(self.diagonal)
        inner = x if self.basis is None else self.basis.T @ x
        return inner / self.diagonal.sqrt()[:, None]

    def summed(self) -> KeyMetric:
        """Return the same metric without groups: written keys become part of `free` and `factor`."""
        return self._sum_groups(None, 1.0, 0.0) if self.written else self

    def _sum_groups(self, gram: Tensor | None, mu: float, energy: float) -> KeyMetric:
        """Add the groups, and keys with Gram matrix X Xᵀ [m, m] and ridge μ, to T⁻¹.

        Keys with μ = 0 remove their span from `free`; independent parts below `DEPENDENT` are rounding errors.
        """
        size = len(self.diagonal)
        soft, exact = (self.diagonal.new_zeros(size, size) for _ in range(2))
        for group in self.written:
            (soft if group.mu else exact).addmm_(group.keys, group.keys.T, alpha=1 / (group.mu or 1.0))
            energy = energy if group.mu else max(energy, _energy(group.keys))
        if gram is not None:
            (soft if mu else exact).add_(gram, alpha=1 / (mu or 1.0))
        free = self.free
        projected = soft if free is None else free.T @ soft @ free
        inverse = projected + (torch.eye(self.size).to(projected) if self.factor is None else self.factor @ self.factor.T)
        if bool(exact.any()):
            values, vectors = torch.linalg.eigh(exact if free is None else free.T @ exact @ free)
            null = vectors[:, values <= DEPENDENT * energy]
            free = null if free is None else free @ null
            inverse = null.T @ inverse @ null
        return KeyMetric(self.basis, self.diagonal, free, torch.linalg.cholesky((inverse + inverse.T) / 2))

    def _transform(self, x: Tensor) -> Tensor:
        """Return T x for whitened x [m, ·]."""
        result = x if self.free is None else self.free.T @ x
        if self.factor is not None:
            result = torch.cholesky_solve(result, self.factor)
        result = result if self.free is None else self.free @ result
        for group in self.written:
            result = result - group.right @ (group.keys.T @ result)
        return result

    def _unwhiten(self, x: Tensor) -> Tensor:
        """Return Q D^(-1/2) x for whitened x [m, ·]."""
        scaled = x / self.diagonal.sqrt()[:, None]
        return scaled if self.basis is None else self.basis @ scaled


@dataclass(frozen=True)
class Solved:
    """Matrix A of a solve, on its smaller side: changes R [d_out, n] become ΔW = R Aᵀ.

    Attributes:
        rows: Aᵀ [n, d_in]; with more keys than inputs, Z [m, d_in] with Aᵀ = Xᵀ Z.
        metric: Metric that whitens the keys to X; None if `rows` is Aᵀ.
        keys: K as rows [n, d_in], in their original dtype.
    """

    rows: Tensor
    metric: KeyMetric | None
    keys: Tensor

    def update(self, changes: Tensor) -> tuple[Tensor, Tensor]:
        """Return ΔW as a product in float64: columns [d_out, ·] and rows [·, d_in].

        Args:
            changes: R as rows [n, d_out], in any floating dtype.
        """
        if self.metric is None:
            return changes.to(self.rows).T, self.rows
        columns = self.rows.new_zeros(changes.shape[1], self.rows.shape[0])
        for start in range(0, len(self.keys), CHUNK):
            part = slice(start, start + CHUNK)
            columns.addmm_(changes[part].to(self.rows).T, self.metric.whitened(self.keys[part].T).T)
        return columns, self.rows


def solve(keys: Tensor, metric: KeyMetric, mu: float) -> Solved:
    """Solve for A. The requested changes are not needed yet, and one solution serves several of them.

    Args:
        keys: K as rows [n, d_in], in any floating dtype. More rows than inputs are read in chunks and never copied together.
        metric: G.
        mu: Ridge. With 0, every change is written exactly, as far as keys are independent of each other and of written ones:
            equal keys get the mean of their changes, and written keys are not written again.
    """
    if len(keys) <= metric.size:
        whitened = metric.whitened(keys.T)
        transformed = metric._transform(whitened)
        right = _solve_ridge(whitened.T @ transformed, mu, transformed.T, _energy(whitened)).T
        return Solved(metric._unwhiten(right).T, None, keys)
    metric = metric.summed()
    gram, energy = metric.diagonal.new_zeros(len(metric.diagonal), len(metric.diagonal)), 0.0
    for chunk in torch.split(keys.T, CHUNK, 1):
        whitened = metric.whitened(chunk)
        energy = max(energy, _energy(whitened))
        gram.addmm_(whitened, whitened.T)
    # A = B T X (XᵀT X + μI)⁻¹ with T = N (L Lᵀ)⁻¹ Nᵀ is B H (HᵀX XᵀH + μI)⁻¹ HᵀX with H = N L⁻ᵀ.
    half = torch.eye(metric.size).to(gram)
    if metric.factor is not None:
        half = torch.linalg.solve_triangular(metric.factor.T, half, upper=True)
    half = half if metric.free is None else metric.free @ half
    inner = _solve_ridge(half.T @ gram @ half, mu, half.T, energy)
    return Solved(metric._unwhiten(half @ inner).T, metric, keys)


def factors_of(left: Tensor, right: Tensor) -> Factors:
    """Return a product as float32 factors of its numerical rank: dependent keys do not increase it.

    Args:
        left: [d_out, n], float64.
        right: [n, d_in], float64.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T)
    rank = max(1, int((values > INDEPENDENT * values[:1]).sum()))
    root = values[:rank].sqrt()
    # Fix the sign of each pair, so that equal updates give equal factors.
    first = q_left @ u[:, :rank]
    signs = first.gather(0, first.abs().argmax(0)[None])[0].sign()
    return Factors((first * root * signs).float().contiguous(), ((q_right @ v[:rank].T) * root * signs).T.float().contiguous())


def factors_of_steps(update: Tensor, pairs: Sequence[tuple[Tensor, Tensor]] | None) -> Factors:
    """Return an update ΔW [d_out, d_in], the sum of several products, as factors of its numerical rank.

    Args:
        update: The sum, float64; zeros give factors of zeros.
        pairs: The products; used if they have fewer columns in total than the shorter side of the matrix.
    """
    size = min(update.shape)
    if pairs and sum(left.shape[1] for left, _ in pairs) < size:
        return factors_of(torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 0))
    identity = torch.eye(size).to(update)
    return factors_of(identity, update) if size == update.shape[0] else factors_of(update, identity)


def _gram(chunks: Sequence[Tensor], size: int) -> Tensor:
    """Return the sum of X Xᵀ over chunks [size, ·]."""
    gram = chunks[0].new_zeros(size, size)
    for chunk in chunks:
        gram.addmm_(chunk, chunk.T)
    return gram


def _energy(whitened: Tensor) -> float:
    """Return the largest kᵀG k of whitened keys [m, n] before keys are written, the reference for rounding errors."""
    return float(whitened.square().sum(0).max()) if whitened.shape[1] else 0.0


def _solve_ridge(gram: Tensor, mu: float, right: Tensor, energy: float) -> Tensor:
    """Return (gram + μI)⁻¹ right for a symmetric gram; with μ = 0 and a singular gram, the least-norm solution.

    Args:
        gram: [n, n], KᵀG K or the other side's X Xᵀ.
        mu: Ridge.
        right: [n, ·].
        energy: Largest kᵀG k before keys were written: shares below `DEPENDENT` of it are rounding errors of the keys.
    """
    if not len(gram):
        return right
    if mu < 0:  # keys that are taken out: both sides change their sign
        return -_solve_ridge(-gram, -mu, right, 0.0)
    system = gram + mu * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    system = (system + system.T) / 2
    floor = (ROUNDING if mu else DEPENDENT) * (energy + mu)
    factor, failed = torch.linalg.cholesky_ex(system)
    if not int(failed) and float(factor.diagonal().min()) ** 2 > floor:
        solution: Tensor = torch.cholesky_solve(right, factor)
        return solution
    values, vectors = torch.linalg.eigh(system)
    significant = values > floor
    least_norm: Tensor = vectors[:, significant] @ ((vectors[:, significant].T @ right) / values[significant, None])
    return least_norm

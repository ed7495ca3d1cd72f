"""Orthogonal matching pursuit: vectors as sparse combinations of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.lazy import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

# Elements of the largest intermediate result, targets x atoms.
_ELEMENTS = 1 << 26
# An atom whose part outside the chosen ones is shorter than this adds nothing but rounding errors.
_DEPENDENT = 1e-4


@dataclass(frozen=True)
class Combinations:
    """Sparse combinations of atoms, one for each target.

    Attributes:
        atoms: [targets, k]: indices of atoms, 0 where fewer than k are used.
        coefficients: [targets, k], float32; 0 where fewer than k are used.
        residuals: [targets], float32: length of what no combination explains, over the target's length.
    """

    atoms: Tensor
    coefficients: Tensor
    residuals: Tensor


@no_grad
def pursue(targets: Tensor, atoms: Tensor, k: int) -> Combinations:
    """Approximate each target by a combination of at most k atoms.

    In each of k rounds the atom with the largest absolute cosine with the residual is chosen, and the target is projected on all
    chosen atoms. An orthonormal basis of them grows by one vector a round (Gram-Schmidt, done twice), so that no least-squares
    problem is solved again.

    Args:
        targets: [targets, width], float32.
        atoms: [atoms, width], float32, on the same device. Atoms of length 0 are never chosen.
        k: Largest number of atoms of a combination.

    Source: Pati, Rezaiifar and Krishnaprasad 1993, Orthogonal Matching Pursuit.
    """
    k = min(k, len(atoms), targets.shape[1])
    lengths = atoms.norm(dim=1)
    unit = atoms / lengths.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    size = max(1, _ELEMENTS // max(1, len(atoms)))
    parts = [_pursue(targets[start : start + size], unit, lengths, k) for start in range(0, len(targets), size)]
    if not parts:
        empty = targets.new_zeros(0, k)
        return Combinations(empty.long(), empty, targets.new_zeros(0))
    return Combinations(
        torch.cat([part.atoms for part in parts]),
        torch.cat([part.coefficients for part in parts]),
        torch.cat([part.residuals for part in parts]),
    )


def _pursue(targets: Tensor, unit: Tensor, lengths: Tensor, k: int) -> Combinations:
    """Return the combinations of some targets.

    Args:
        targets: [targets, width].
        unit: [atoms, width]: atoms of length 1, or 0.
        lengths: [atoms]: lengths of the atoms.
        k: Largest number of atoms of a combination.
    """
    count, width = targets.shape
    chosen = torch.zeros(count, k, dtype=torch.long, device=targets.device)
    basis = targets.new_zeros(count, k, width)
    triangle = torch.eye(k, dtype=targets.dtype, device=targets.device).repeat(count, 1, 1)
    inside = targets.new_zeros(count, k)
    residual = targets.clone()
    for number in range(k):
        # The residual is orthogonal to all chosen atoms, so that none of them is the best again.
        likeness, best = (residual @ unit.T).abs_().max(1)
        new, before = unit[best], basis[:, :number]
        along = targets.new_zeros(count, number)
        for _ in range(2):  # once loses orthogonality where atoms are alike
            part = torch.einsum("nkd,nd->nk", before, new)
            along += part
            new = new - torch.einsum("nk,nkd->nd", part, before)
        length = new.norm(dim=1)
        is_used = (length > _DEPENDENT) & (likeness > 0)
        new = torch.where(is_used[:, None], new / length.clamp_min(_DEPENDENT)[:, None], 0.0)
        basis[:, number] = new
        chosen[:, number] = torch.where(is_used, best, 0)
        triangle[:, :number, number] = torch.where(is_used[:, None], along, 0.0)
        triangle[:, number, number] = torch.where(is_used, length, 1.0)
        inside[:, number] = (residual * new).sum(1)
        residual = residual - inside[:, number, None] * new
    # unit[chosen] = basis @ triangle, so that the coefficients solve triangle @ x = inside.
    of_units = torch.linalg.solve_triangular(triangle, inside[:, :, None], upper=True)[:, :, 0]
    scale = lengths[chosen]
    coefficients = torch.where(scale > 0, of_units / scale.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    norms = targets.norm(dim=1)
    return Combinations(chosen, coefficients, torch.where(norms > 0, residual.norm(dim=1) / norms, 0.0))

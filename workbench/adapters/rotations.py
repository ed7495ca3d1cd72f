"""Updates that rotate the inputs of a layer, W·R − W: BOFT and HRA. As with OFT, each depends on the base's weight and is computed by rows.

PEFT's `get_delta_weight` of these kinds builds R whole, [in, in], and multiplies with it. R is block-diagonal, or a few reflections, so the
product is computed from its parts here; tests compare it with PEFT's merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.adapters.dense import DeltaRows, Dense, Rows
from workbench.adapters.entries import Stored
from workbench.adapters.flavours import BAKE
from workbench.adapters.keys import Part
from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.adapters.read import Adapter

_OTHER = "The adapter was trained on another base: set the recipe's `base:` to that model."


@dataclass(frozen=True)
class Boft(Dense):
    """s ⊙ W·Rᵀ − W with a block-diagonal rotation R of the inputs and a scale s of the outputs (Liu et al. 2023, arXiv 2311.06243).

    The blocks are Cayley transforms (I + Q)⁻¹(I − Q) of Q = (D − Dᵀ) / 2, where D is stored. There is one butterfly factor.
    """

    blocks: Stored
    """D, [1, blocks, b, b]."""
    scale: Stored
    """s, [out, 1]."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""
        data = self.blocks.read(device)[0]
        skew = (data - data.transpose(1, 2)) / 2
        eye = torch.eye(data.shape[-1], device=device).expand_as(skew)
        rotation = torch.linalg.solve(eye + skew, eye - skew, left=False)
        scale = self.scale.read(device).reshape(-1, 1)

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            blocks = base.view(len(base), -1, data.shape[-1])
            return torch.einsum("nbc,bkc->nbk", blocks, rotation).reshape(base.shape) * scale[start:stop] - base

        return Rows(compute)


@dataclass(frozen=True)
class Hra(Dense):
    """W·(I − 2u₁u₁ᵀ)…(I − 2uᵣuᵣᵀ) − W with unit vectors u (Householder reflection adaptation, Yuan et al. 2024, arXiv 2405.17484)."""

    stored: Stored
    """The vectors as columns, [in, r], of any length."""
    orthogonal: bool
    """True if Gram-Schmidt makes the vectors orthogonal first (`apply_GS`)."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows.

        Raises:
            WorkbenchError: If a vector is zero, so that it has no direction.
        """
        vectors = self.stored.read(device)
        lengths = vectors.norm(dim=0)
        if not bool((lengths > 0).all()):
            column = int((lengths == 0).nonzero()[0])
            raise WorkbenchError(
                f"{self.stored.label}: column {column} of {self.stored.key} is zero; expected a direction",
                "Train or download this adapter again.",
            )
        units = _orthonormal(vectors) if self.orthogonal else vectors / lengths

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            turned = base.clone()
            for unit in units.T:
                turned -= 2 * torch.outer(turned @ unit, unit)
            return turned - base

        return Rows(compute)


def _orthonormal(vectors: Tensor) -> Tensor:
    """Return the vectors made orthonormal in their order, by Gram-Schmidt as in PEFT."""
    units: list[Tensor] = []
    for vector in vectors.T:
        for unit in units:
            vector = vector - (unit @ vector) * unit
        units.append(vector / vector.norm())
    return torch.stack(units, 1)


def rotation(part: Part, disk: str, spec: TensorSpec, conv1d: bool, adapter: Adapter) -> Boft | Hra:
    """Build the BOFT or HRA update of a linear layer.

    Args:
        part: The adapter's tensors for the layer.
        disk: Name of the weight in the base.
        spec: Shape and dtype of the weight.
        conv1d: Whether the weight is stored as [in, out].
        adapter: The adapter.

    Raises:
        WorkbenchError: If the shapes do not fit the weight or the configuration, or PEFT has no such update.
    """
    config, label = adapter.config, adapter.label
    if conv1d or len(spec.shape) != 2:
        raise WorkbenchError(
            f"{label}: {disk} is no nn.Linear weight, and PEFT applies {config['peft_type']} to those only", _OTHER
        )
    if "hra_u" in part.fields:
        vectors = part.fields["hra_u"]
        if len(vectors.shape) != 2 or vectors.shape[0] != spec.cols:
            raise _shape_error(vectors, f"[{spec.cols}, r]", disk, label)
        adapter.size(part.module, vectors.shape[1])
        return Hra(vectors, bool(config.get("apply_GS")))
    blocks, scale = part.fields["boft_R"], part.fields["boft_s"]
    if len(blocks.shape) == 4 and blocks.shape[0] != 1:
        raise WorkbenchError(
            f"{label}: {blocks.key} has {blocks.shape[0]} butterfly factors; expected 1, as PEFT itself has without its CUDA kernels",
            BAKE,
        )
    if len(blocks.shape) != 4 or blocks.shape[2] != blocks.shape[3] or blocks.shape[1] * blocks.shape[2] != spec.cols:
        raise _shape_error(blocks, f"[1, blocks, b, b] with blocks · b = {spec.cols}", disk, label)
    if scale.shape != (spec.rows, 1):
        raise _shape_error(scale, f"[{spec.rows}, 1]", disk, label)
    adapter.check_blocks(part.module, spec.cols, blocks.shape[2])
    return Boft(blocks, scale)


def _shape_error(stored: Stored, expected: str, disk: str, label: str) -> WorkbenchError:
    return WorkbenchError(f"{label}: {stored.key} is {list(stored.shape)}; expected {expected} for {disk} in the base", _OTHER)
